"""Fewer tokens the deeper a layer lies, along half a wave (p-MoD, arXiv 2412.04449).

Layer l of L is passed by the share cos(pi l / (L - 1)) / 2 + shift of the tokens, and by no less
than a floor; where the share is above a ceiling the layer is dense, and so is the first in any
case. Published are a shift of 0.5, a floor of 0.15 and a ceiling of 0.85. The shift moves the whole
wave up or down, and is what a budget is solved for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, model_validator

from edgevlm.document import Complaint
from edgevlm.reduce.piece import Schedule, StaticClass, register

__all__ = ["Cosine"]

PUBLISHED = 0.5
# The last layer's share is the ceiling itself where a budget is as large as can be.
ROUNDING = 1e-9


@register
class Cosine(Schedule):
    """Shares along half a wave, between a floor and a ceiling."""

    name: ClassVar[str] = "cosine"
    static_class: ClassVar[StaticClass] = "S0"
    says_share: ClassVar[bool] = True

    floor: float = Field(0.15, gt=0, le=1, description="The least share that passes a layer.")
    ceiling: float = Field(0.85, gt=0, le=1, description="Layers of a larger share are dense.")
    shift: float | None = Field(
        None, description="The share in the middle; absent: 0.5, or what a budget needs."
    )

    @model_validator(mode="after")
    def _has_room(self) -> Cosine:
        if self.floor > self.ceiling:
            raise Complaint(
                f"a floor of {self.floor:g} is above the ceiling of {self.ceiling:g}",
                hint="lower floor, or raise ceiling",
                key="floor",
            )
        return self

    @property
    def is_fixed(self) -> bool:
        """Whether a shift is given."""
        return self.shift is not None

    def shares(self, num_layers: int, x: float | None) -> Mapping[int, float]:
        """With a budget's x the shift goes from the floor in all layers to all but the last."""
        shift = PUBLISHED if self.shift is None else self.shift
        if self.shift is None and x is not None:
            lowest, highest = self.floor - 0.5, self.ceiling + 0.5
            shift = lowest + x * (highest - lowest)
        found = {}
        for layer in range(1, num_layers):
            share = max(0.5 * math.cos(math.pi * layer / (num_layers - 1)) + shift, self.floor)
            if share <= self.ceiling + ROUNDING:
                found[layer] = min(share, 1.0)
        if not found:
            raise Complaint(
                f"a shift of {shift:g} leaves no layer of {num_layers} that tokens skip",
                hint="lower shift, or raise ceiling",
            )
        return found
