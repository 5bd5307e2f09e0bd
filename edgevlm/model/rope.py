"""Rotary tables: cosines and sines of positions, one row per row of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from edgevlm.model.spec import RopeSpec


def rope_tables(rope: RopeSpec, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, R] of positions [T], or of [A, T] for A axes.

    With sections, consecutive frequencies turn with the first, second and further positions; a row
    of text has equal ones.
    """
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32)
    if rope.sections:
        axes = positions.expand(len(rope.sections), -1).float()
        lengths = torch.tensor(rope.sections)
        angles = axes.repeat_interleave(lengths, dim=0).T * inv_freq
    else:
        angles = positions.float()[:, None] * inv_freq
    return angles.cos() * rope.attention_scaling, angles.sin() * rope.attention_scaling
