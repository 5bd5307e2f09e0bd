"""Rotary position embedding in the half layout: feature i turns with feature i + R.

The tables hold one row per row of x: [rows >= T, R], or [B, T, R] where a batch has positions of
its own. A table narrower than half a head rotates the head's first 2R features only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgevlm_export.ops.heads import from_heads, to_heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, H, T, D]."""
    rows, pairs = x.shape[2], cos.shape[-1]
    cos, sin = (table[..., :rows, :].unsqueeze(-3) for table in (cos, sin))
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@torch.library.custom_op("edgevlm::rotary", mutates_args=())
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    return from_heads(rotate(to_heads(x, num_heads), cos, sin))


@_rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(x)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotate the heads of [B, T, H*D]."""
    out: Tensor = _rotary(x, cos, sin, num_heads)
    return out
