"""Tokens back in the order in which they stand in the picture."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.reduce.members import followed, numpy_followed
from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import picked

if TYPE_CHECKING:
    from torch import Tensor


def in_order(tokens: VisSeq[Tensor], *, dense: bool = False) -> VisSeq[Tensor]:
    """The same tokens by their places, of which no two are one: ascending."""
    import torch

    from edgevlm_export.ops import take_rows

    places, count = tokens.places, tokens.places.shape[1]
    rank = (places[:, None] < places[:, :, None]).sum(-1)
    # Which row is the n-th: sorting would be no op that every target takes.
    is_next = rank[:, None] == torch.arange(count)[:, None]
    rows = is_next.to(torch.float32).argmax(-1)
    sizes, way = tokens.sizes, tokens.provenance
    return replace(
        tokens,
        features=take_rows(tokens.features, rows, dense),
        places=picked(places, rows, dense=dense),
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
