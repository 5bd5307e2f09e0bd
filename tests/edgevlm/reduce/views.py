"""Views of a decoder call for tests: the same numbers as numpy arrays and as torch tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgevlm.reduce.seq import Probe, VisSeq
from edgevlm.reduce.view import Call, View

WIDTH, HEAD = 24, 8

# T rows, P pictures of N tokens


def call_view(
    *,
    num_pictures: int = 1,
    grid: tuple[int, int] = (4, 5),
    heads: tuple[int, int] = (4, 2),
    seed: int = 0,
) -> View[np.ndarray]:
    """Pictures between rows of text, two probes and the rows behind the last norm, from a seed."""
    random = np.random.default_rng(seed)
    count = grid[0] * grid[1]
    starts = 3 + (count + 2) * np.arange(num_pictures)
    end = int(starts[-1]) + count
    length = end + 7
    # Two rows behind the prompt, which nothing may look at.
    last = length - 3
    rows = random.standard_normal((1, length, WIDTH)).astype(np.float32)
    places = starts[:, None] + np.arange(count)
    text = np.ones((1, length), np.float32)
    text[0, places] = 0
    text[0, last + 1 :] = 0
    question = text * (np.arange(length) >= end)
    words = question.copy()
    words[0, end + 1] = 0
    raters = question * (np.arange(length) % 2 == 0)
    return View(
        tokens=VisSeq(
            features=rows[0][places],
            places=np.tile(np.arange(count), (num_pictures, 1)),
            grid=grid,
        ),
        probes={
            name: probe_of_rows(random, np.arange(length), heads) for name in ("own", "previous")
        },
        call=Call(
            rows=rows,
            starts=starts,
            last=np.array([last]),
            weights={"text": text, "question": question, "words": words, "raters": raters},
        ),
        normed=random.standard_normal((1, length, WIDTH)).astype(np.float32),
    )


def probe_of_rows(
    random: np.random.Generator, positions: np.ndarray, heads: tuple[int, int]
) -> Probe[np.ndarray]:
    """Queries and keys from a seed; three of the four pairs of a head turn."""
    q, k = (
        random.standard_normal((1, len(positions), count * HEAD)).astype(np.float32)
        for count in heads
    )
    angles = positions[:, None] * 10.0 ** -np.arange(3.0)
    return Probe(
        q=q,
        k=k,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        scale=HEAD**-0.5,
        cos=np.cos(angles).astype(np.float32),
        sin=np.sin(angles).astype(np.float32),
    )


def in_torch(view: View[np.ndarray]) -> View[Tensor]:
    """The same in torch."""
    return _converted(view)  # type: ignore[no-any-return]


def _converted(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {name: _converted(part) for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {
            field.name: _converted(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **parts)
    return value
