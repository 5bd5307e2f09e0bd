"""What the question looks at more than text in general does (after CARVE, arXiv 2509.06461).

CARVE asks the model twice, with the question and with a request for a general description, and
divides the first attention by the second. Here both come from one prompt: the last row stands for
the question, the mean over all rows of text for what looks in general.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from edgevlm.reduce.attending import numpy_text_scores, text_scores
from edgevlm.reduce.piece import Scorer, Site, StaticClass, register

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.view import View

LEAST = 1e-8
"""Added to what is divided by, as published."""


@register
class Contrast(Scorer):
    """Attention of the last row, over the mean attention of all text rows."""

    name: ClassVar[str] = "contrast"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("decoder",)

    layer: Literal["own", "previous"] = Field(
        "own", description="The layer behind the cut, or the one before it."
    )
    rope: Literal["on", "off"] = Field("on", description="Rotated, or not rotated.")

    @property
    def needs(self) -> frozenset[str]:
        """Attention, and weights of text rows."""
        return frozenset({"attention", "question"})

    @property
    def asks(self) -> frozenset[str]:
        """All text."""
        return frozenset({"text"})

    @property
    def looks_back(self) -> bool:
        """Where the layer is the previous one."""
        return self.layer == "previous"

    @property
    def looks_here(self) -> bool:
        """Where the layer is the own one."""
        return self.layer == "own"

    def torch(self, view: View[Tensor]) -> Tensor:
        """Two probes of one layer."""
        asked, general = (
            text_scores(view, self.layer, query, self.rope) for query in ("last", "text")
        )
        return asked / (general + LEAST)

    def numpy(self, view: View[np.ndarray]) -> np.ndarray:
        """By the twin of both."""
        asked, general = (
            numpy_text_scores(view, self.layer, query, self.rope) for query in ("last", "text")
        )
        found: np.ndarray = asked / (general + LEAST)
        return found
