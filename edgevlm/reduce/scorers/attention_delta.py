"""What the question begins to look at in a layer, and what is like it (CATP, arXiv 2508.07871)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from edgevlm.reduce.attending import (
    numpy_question_likeness,
    numpy_text_scores,
    question_likeness,
    text_scores,
)
from edgevlm.reduce.piece import Scorer, Site, StaticClass, register

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.view import View


@register
class AttentionDelta(Scorer):
    """What the last row attends to more in the layer behind the cut than in the one before it.

    Less attention is no loss: max(0, A_K - A_(K-1)) + weight * cos(token, mean of the question).
    """

    name: ClassVar[str] = "attention_delta"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("decoder",)

    weight: float = Field(0.6, ge=0, description="Of the likeness to the question.")
    query: Literal["text", "question", "words"] = Field(
        "question", description="The rows whose mean is the question."
    )

    @property
    def needs(self) -> frozenset[str]:
        """Attention, and weights of text rows."""
        return frozenset({"attention", "question"})

    @property
    def looks_back(self) -> bool:
        """At A_(K-1)."""
        return True

    @property
    def looks_here(self) -> bool:
        """At A_K."""
        return True

    def torch(self, view: View[Tensor]) -> Tensor:
        """Two probes of one row, and one product."""
        now, before = (text_scores(view, layer, "last") for layer in ("own", "previous"))
        return (now - before).relu() + self.weight * question_likeness(view, self.query)

    def numpy(self, view: View[np.ndarray]) -> np.ndarray:
        """By the twins of both."""
        import numpy as np

        now, before = (numpy_text_scores(view, layer, "last") for layer in ("own", "previous"))
        more: np.ndarray = np.maximum(now - before, 0.0)
        return more + self.weight * numpy_question_likeness(view, self.query)
