"""Where merged tokens stand in the picture, and steps in which as many merge."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.reduce.members import followed, numpy_followed
from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import picked, ranked

if TYPE_CHECKING:
    from torch import Tensor


BEHIND = 2.0**24
"""Behind every place; up to here float32 counts."""


def first_place(places: Tensor, weights: Tensor, others: Tensor) -> Tensor:
    """The lowest of each place [B, N] and those of the others [B, M] that come to it, by [B, N, M].

    Places are compared in float32: ReduceMin of ONNX Runtime 1.31 errs with int64.
    """
    import torch

    came = torch.where(weights > 0, others[:, None].to(torch.float32), BEHIND).amin(-1)
    return torch.minimum(places.to(torch.float32), came).to(places.dtype)


def in_order(tokens: VisSeq[Tensor], *, dense: bool = False) -> VisSeq[Tensor]:
    """The same tokens by their places, of which no two are one: ascending."""
    import torch

    from edgevlm_export.ops import take_rows

    count = tokens.places.shape[1]
    rank = ranked(tokens.places.to(torch.float32) * -1.0)
    # Which row is the n-th: sorting would be no op that every target takes.
    is_next = rank[:, None] == torch.arange(count)[:, None]
    rows = is_next.to(torch.float32).argmax(-1)
    sizes, way = tokens.sizes, tokens.provenance
    return replace(
        tokens,
        features=take_rows(tokens.features, rows, dense),
        places=picked(tokens.places, rows, dense=dense),
        sizes=None if sizes is None else picked(sizes, rows, dense=dense),
        provenance=None if way is None else followed(way, rank, dense=dense),
    )


def numpy_in_order(tokens: VisSeq[np.ndarray]) -> VisSeq[np.ndarray]:
    """The twin of `in_order`."""
    order = tokens.places.argsort(1)
    sizes, way = tokens.sizes, tokens.provenance
    return replace(
        tokens,
        features=np.take_along_axis(tokens.features, order[..., None], 1),
        places=np.take_along_axis(tokens.places, order, 1),
        sizes=None if sizes is None else np.take_along_axis(sizes, order, 1),
        provenance=None if way is None else numpy_followed(way, order.argsort(1)),
    )


def even_steps(start: int, end: int, count: int) -> list[int]:
    """How many tokens are left after each of `count` steps that take as many, `end` at last."""
    return [start - (start - end) * step // count for step in range(1, count + 1)]


def even_places(num_tokens: int, count: int) -> list[int]:
    """The tokens in the middles of as many equal runs of them, ascending."""
    return [(2 * run + 1) * num_tokens // (2 * count) for run in range(count)]
