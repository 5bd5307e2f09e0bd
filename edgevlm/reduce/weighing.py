"""How much tokens get of what a layer adds, where some pass it and others skip it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from edgevlm.reduce.seq import ArrayT

__all__ = ["Weighing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighing(Generic[ArrayT]):
    """Weights [P, N] of the N tokens of P groups; None for ones.

    A token that passes gets what attention and MLP add to it by the weights `attention` and `mlp`;
    one that skips is multiplied by `skipped`.
    """

    attention: ArrayT | None = None
    mlp: ArrayT | None = None
    skipped: ArrayT | None = None
