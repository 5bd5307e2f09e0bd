"""Tokens that stand for all others, and for the question (CATP's first stage, arXiv 2508.07871).

Facility location: every token is served by the kept token that is most like it, and what a set is
worth is how well it serves all, plus how like its tokens are to the mean of the question's rows.
Cosines are taken from 0 to 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from edgevlm.reduce.piece import Choice, Site, StaticClass, register
from edgevlm.reduce.view import numpy_unit, unit

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View


@register
class Facility(Choice):
    """Greedy: at every step the token that is worth most beside those that are kept."""

    name: ClassVar[str] = "facility"
    static_class: ClassVar[StaticClass] = "S2"
    sites: ClassVar[tuple[Site, ...]] = ("projector",)

    query: Literal["text", "question", "words"] = Field(
        "question", description="The rows of text whose mean tokens are compared with."
    )
    weight: float = Field(0.7, ge=0, description="Of the likeness to the question.")

    @property
    def needs(self) -> frozenset[str]:
        """The question, before the picture is encoded."""
        return frozenset({"question"})

    def macs(self, extent: Extent) -> int:
        """Every token by every token, and likeness to the question."""
        rows = extent.tokens
        return (rows * rows + rows + extent.question) * extent.width

    def torch(self, view: View[Tensor], scores: Tensor | None, count: int) -> Tensor:
        """Gains [B, N, N] of serving, and a bonus [B, N] for the question."""
        from edgevlm_export.ops import cover_rows

        assert view.question is not None
        tokens = unit(view.tokens.features)
        asked = view.asked[self.query]
        mean = (asked / asked.sum(-1, keepdim=True))[:, None] @ view.question
        serves = (1.0 + tokens @ tokens.mT) / 2.0
        bonus = (1.0 + tokens @ unit(mean).mT) * (self.weight / 2.0)
        return cover_rows(serves, bonus[..., 0], count)

    def numpy(self, view: View[np.ndarray], scores: np.ndarray | None, count: int) -> np.ndarray:
        """By definition: at every step what each larger set is worth."""
        import numpy as np

        assert view.question is not None
        asked = view.asked[self.query][0] / view.asked[self.query][0].sum()
        mean = numpy_unit(asked @ view.question[0].astype(np.float64))
        found = []
        for features in view.tokens.features.astype(np.float64):
            rows = numpy_unit(features)
            serves, answers = (1 + rows @ rows.T) / 2, (1 + rows @ mean) / 2
            chosen: list[int] = []
            while len(chosen) < count:
                left = [row for row in range(len(rows)) if row not in chosen]
                sets = [[*chosen, row] for row in left]
                worth = [serves[s].max(0).sum() + self.weight * answers[s].sum() for s in sets]
                chosen.append(left[int(np.argmax(worth))])
            found.append(sorted(chosen))
        return np.array(found, np.int64)
