"""Layers at even distances, all of which as many tokens pass (VideoLLM-MoD, arXiv 2408.16730)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from edgevlm.document import Complaint
from edgevlm.reduce.piece import Schedule, StaticClass, register

__all__ = ["Every"]


@register
class Every(Schedule):
    """One layer of every `step`, from a first one on."""

    name: ClassVar[str] = "every"
    static_class: ClassVar[StaticClass] = "S0"

    step: int = Field(2, ge=1, description="From one such layer to the next.")
    first: int = Field(1, ge=1, description="The first of them; those before it are dense.")

    def shares(self, num_layers: int, x: float | None) -> Mapping[int, None]:
        """As many as the stage keeps."""
        if self.first >= num_layers:
            raise Complaint(
                f"tokens skip layers from layer {self.first} on, of a decoder of {num_layers}",
                hint=f"choose first from 1 to {num_layers - 1}",
            )
        return dict.fromkeys(range(self.first, num_layers, self.step))
