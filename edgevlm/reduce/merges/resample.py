"""Learned queries that attend to all tokens, and leave in their place (LLaVA-Mini).

LLaVA-Mini (arXiv 2501.03895) compresses the features of an encoder to C * C tokens: as many learned
queries attend once, with 8 heads, to the normed features. Queries and keys have their places on the
grid added, as sines and cosines of rows and columns; a query's place is the middle of its C-th part
of each side. (The published table is made for C * C places and resized; here both are evaluated at
the places themselves, on the scale of the queries' grid.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from edgevlm.document import Complaint
from edgevlm.reduce.learned import (
    Weight,
    attended,
    attention_macs,
    attention_weights,
    check_heads,
    learned,
    norm_weights,
    normed,
    numpy_attended,
    numpy_learned,
    numpy_normed,
)
from edgevlm.reduce.order import even_places
from edgevlm.reduce.piece import Merge, Site, StaticClass, register
from edgevlm.reduce.seq import VisSeq

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View

LONGEST = 10000.0
"""The longest wave of places, in steps of 2 pi."""


@register
class Resample(Merge):
    """One attention of queries to tokens on a grid; a square number of queries."""

    name: ClassVar[str] = "resample"
    static_class: ClassVar[StaticClass] = "S0"
    sites: ClassVar[tuple[Site, ...]] = ("encoder", "projector")
    is_learned: ClassVar[bool] = True
    is_ordered: ClassVar[bool] = True

    heads: int = Field(8, ge=1)

    @property
    def needs(self) -> frozenset[str]:
        """Tokens on a whole grid."""
        return frozenset({"grid"})

    def fit(self, num_tokens: int, count: int) -> int:
        """The largest square."""
        return count if count == num_tokens else math.isqrt(count) ** 2

    def check(self, num_tokens: int, count: int) -> None:
        """Queries lie on a square."""
        side = math.isqrt(count)
        if side * side != count and count != num_tokens:
            raise Complaint(
                f"learned queries lie on a square, and {count} tokens are none",
                hint=f"keep {side**2}, or {(side + 1) ** 2}",
            )

    def weights(self, extent: Extent) -> Mapping[str, Weight]:
        """Queries [k, C], norms of both sides and one attention."""
        check_heads(extent.width, self.heads)
        check_heads(extent.width, 4, "waves")
        return {
            "queries": Weight(shape=(extent.kept, extent.width), deviation=0.02),
            **norm_weights("query_norm", extent.width),
            **norm_weights("key_norm", extent.width),
            **attention_weights("attention", extent.width),
        }

    def macs(self, extent: Extent) -> int:
        """The attention: keys and values of every token."""
        return attention_macs(extent.kept, extent.tokens, extent.width)

    def torch(self, view: View[Tensor], count: int) -> VisSeq[Tensor]:
        """All pictures have the same queries."""
        import torch

        weights, tokens = learned(view, self.name), view.tokens
        batch, num_tokens, width = tokens.features.shape
        assert tokens.grid is not None, "checked when the stage was sized"
        asking, places = (torch.from_numpy(x) for x in _waves(tokens.grid, count, width))
        values = normed(weights, "key_norm", tokens.features)
        queries = normed(weights, "query_norm", weights["queries"]) + asking
        queries = queries.expand(batch, count, width)
        found = attended(weights, "attention", queries, values + places, self.heads, values=values)
        kept = torch.tensor(even_places(num_tokens, count)).expand(batch, count)
        return VisSeq(features=found, places=kept)

    def numpy(self, view: View[np.ndarray], count: int) -> VisSeq[np.ndarray]:
        """Head by head, in float64."""
        weights, tokens = numpy_learned(view, self.name), view.tokens
        batch, num_tokens, width = tokens.features.shape
        assert tokens.grid is not None, "checked when the stage was sized"
        asking, places = _waves(tokens.grid, count, width)
        values = numpy_normed(weights, "key_norm", tokens.features.astype(np.float64))
        queries = numpy_normed(weights, "query_norm", weights["queries"]) + asking
        found = numpy_attended(
            weights,
            "attention",
            np.repeat(queries[None], batch, 0),
            values + places,
            self.heads,
            values=values,
        )
        kept = np.tile(even_places(num_tokens, count), (batch, 1))
        return VisSeq(features=found, places=kept)


def _waves(grid: tuple[int, int], count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of queries [count, C] and of tokens [N, C] float32, in steps of the queries' grid."""
    sides = (math.isqrt(count),) * 2
    if math.prod(sides) != count:
        # As many queries as tokens lie as these do.
        sides = grid
    own = [np.arange(side) + 0.0 for side in sides]
    theirs = [
        (np.arange(cells) + 0.5) * (side / cells) - 0.5
        for cells, side in zip(grid, sides, strict=True)
    ]
    return _sines(own[0], own[1], width), _sines(theirs[0], theirs[1], width)


def _sines(rows: np.ndarray, columns: np.ndarray, width: int) -> np.ndarray:
    """Sines and cosines [rows * columns, C] of rows in one half, of columns in the other."""
    frequencies = LONGEST ** -(np.arange(width // 4) / (width // 4))
    turns = (side[:, None] * frequencies for side in (rows, columns))
    down, across = (np.concatenate([np.sin(turn), np.cos(turn)], 1) for turn in turns)
    table = np.zeros((len(rows), len(columns), width), np.float32)
    table[..., : width // 2] = down[:, None]
    table[..., width // 2 :] = across
    return table.reshape(-1, width)
