"""The carrier: the visual tokens of some pictures, with all that a stage may ask about them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

ArrayT = TypeVar("ArrayT")

# B groups (pictures, frames or tiles), N tokens of each, N0 of them before any stage, C width


@dataclass(frozen=True, kw_only=True, slots=True)
class VisSeq(Generic[ArrayT]):
    """Visual tokens on their way: torch tensors, or numpy arrays for the twins.

    `features` [B, N, C]. `places` [B, N] int64 are the tokens before any stage that these stand for
    (of a merged one the first), ascending where order was kept. `sizes` [B, N] count what each was
    merged from, None for one each. `grid` (height, width) is there as long as the tokens lie in
    raster order on a whole grid. `valid` [B, N] is there where groups are padded.

    `provenance` [B, N0] int64 says of every token before any stage which of these it went to, -1
    for none; it is there where somebody asks (`edgevlm.reduce.members`). Of what a piece gives it
    is the way of the tokens that came to it, [B, N]. `text` [B, Q, W] are the rows of text that
    have seen each picture, where they are fused before the decoder; `fine` [B, P, C] the features
    of all patches, window by window, where tokens look at them again in the decoder.
    """

    features: ArrayT
    places: ArrayT
    sizes: ArrayT | None = None
    grid: tuple[int, int] | None = None
    valid: ArrayT | None = None
    provenance: ArrayT | None = None
    text: ArrayT | None = None
    fine: ArrayT | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe(Generic[ArrayT]):
    """Queries and keys of one attention layer, before rotation.

    `q` [B, T, Hq * D] and `k` [B, T, Hkv * D] are those of all rows of the call, of which the
    patches begin at row `first`; `class_row` is the row of the class token, if there is one. `cos`
    and `sin` [T, R] turn them. `order` [T] sorts rows back where the layer has another order.
    """

    q: ArrayT
    k: ArrayT
    num_heads: int
    num_kv_heads: int
    scale: float
    first: int = 0
    class_row: int | None = None
    cos: ArrayT | None = None
    sin: ArrayT | None = None
    order: ArrayT | None = None


def replaced(tokens: VisSeq[ArrayT], features: ArrayT) -> VisSeq[ArrayT]:
    """The same tokens with other features."""
    return replace(tokens, features=features)
