"""Which tokens a token was made of: the way of every token through stages, and the places of some.

A piece says where each of the tokens that came to it went. Stages follow one another, so what goes
on is followed from the first: `provenance` of the carrier. PPE gives a merged token the places of
K of its members, from the last in raster order backwards, and round again where they are fewer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import picked

if TYPE_CHECKING:
    from torch import Tensor

# B groups, N0 tokens before any stage, N that came to a stage, k that left it, K places of each

GONE = -1
"""Where a token went that is in none of those that are left."""


def followed(way: Tensor, step: Tensor, *, dense: bool = False) -> Tensor:
    """One way [B, N0] after another, [B, N]: those that were gone stay so."""
    import torch

    onward = picked(step, torch.where(way < 0, 0, way), dense=dense)
    found: Tensor = torch.where(way < 0, GONE, onward)
    return found


def numpy_followed(way: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The twin of `followed`: token by token."""
    return np.array(
        [
            [GONE if place < 0 else onward[place] for place in places]
            for places, onward in zip(way, step, strict=True)
        ],
        np.int64,
    )


def begun(tokens: VisSeq[Tensor]) -> VisSeq[Tensor]:
    """The same tokens, whose way begins here, where it is followed."""
    import torch

    if tokens.provenance is None:
        return tokens
    return replace(tokens, provenance=torch.arange(tokens.places.shape[1]) + tokens.places * 0)


def numpy_begun(tokens: VisSeq[np.ndarray]) -> VisSeq[np.ndarray]:
    """The twin of `begun`, for everybody."""
    return replace(tokens, provenance=np.arange(tokens.places.shape[1]) + tokens.places * 0)


def own_columns(tokens: VisSeq[Tensor]) -> list[Tensor]:
    """[B, N, N]: a column for each token with a one in its row, which sums of rows have of members.

    None where nobody asks.
    """
    import torch

    if tokens.provenance is None:
        return []
    rows = torch.arange(tokens.places.shape[1])
    return [(rows[:, None] == rows).to(tokens.features.dtype) + tokens.features[:, :, :1] * 0.0]


def way_of_rows(rows: Tensor, num_tokens: int) -> Tensor:
    """The way [B, N] of tokens of which those in rows [B, k] go on."""
    import torch

    return way_of_members(rows[:, :, None] == torch.arange(num_tokens))


def way_of_members(belongs: Tensor) -> Tensor:
    """The way [B, N] of tokens, those marked in bool [B, k, N] for each of the k that leave."""
    import torch

    numbers = torch.arange(belongs.shape[1])[:, None]
    found: Tensor = torch.where(belongs, numbers, GONE).amax(1)
    return found


def way_of_merged(rows: Tensor, came: Tensor, others: Tensor, num_tokens: int) -> Tensor:
    """The way [B, N] of tokens of which those in rows [B, k] go on, and others [B, G] join them.

    `came` [B, m, G] has a one where one of the others came to one of the last m of the rows.
    """
    import torch

    numbers, first = torch.arange(num_tokens), rows.shape[1] - came.shape[1]
    own = rows[:, :, None] == numbers
    joined = came @ (others[:, :, None] == numbers).to(came.dtype) > 0
    return way_of_members(torch.cat([own[:, :first], own[:, first:] | joined], 1))


def numpy_way_of_rows(rows: np.ndarray, num_tokens: int) -> np.ndarray:
    """The twin of `way_of_rows`."""
    return np.array(
        [
            [list(kept).index(row) if row in kept else GONE for row in range(num_tokens)]
            for kept in rows
        ],
        np.int64,
    )


def member_places(provenance: Tensor, count: int, num_places: int) -> Tensor:
    """Places [B, k, K] of members of each of `count` tokens."""
    import torch

    places = torch.arange(provenance.shape[1])
    belongs = provenance[:, None] == torch.arange(count)[:, None]
    last = torch.where(belongs, places, GONE).amax(-1)
    found = [last]
    while len(found) < num_places:
        is_before = belongs & (places < found[-1][..., None])
        before = torch.where(is_before, places, GONE).amax(-1)
        found.append(torch.where(before < 0, last, before))
    return torch.stack(found, -1)
