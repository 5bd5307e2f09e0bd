"""Tokens that are unlike each other and matter to the question (CDPruner, arXiv 2506.10967).

A determinantal point process prefers sets whose kernel has a large determinant. The kernel of two
tokens is their cosine times what each of them matters, which is how like it is to the question in
the space of the decoder, from 0 for the token that is least to 1 for the one that is most.
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

NARROW = 1e-6
"""Keeps tokens that matter alike from a division by zero."""


@register
class Dpp(Choice):
    """Greedy: at every step what adds most to the determinant."""

    name: ClassVar[str] = "dpp"
    static_class: ClassVar[StaticClass] = "S2"
    sites: ClassVar[tuple[Site, ...]] = ("projector",)

    query: Literal["text", "question", "words"] = Field(
        "question", description="Which rows of text say what matters."
    )

    @property
    def needs(self) -> frozenset[str]:
        """The question, before the picture is encoded."""
        return frozenset({"question"})

    def macs(self, extent: Extent) -> int:
        """The kernel, likeness to the question, and what every step has explained so far."""
        rows, steps = extent.tokens, extent.kept - extent.extra
        likeness = (rows + extent.question) * extent.width
        return rows * rows * extent.width + likeness + rows * (steps - 1) * (steps - 2) // 2

    def torch(self, view: View[Tensor], scores: Tensor | None, count: int) -> Tensor:
        """The kernel once, of which every step reads a row."""
        from edgevlm_export.ops import dpp_rows

        assert view.question is not None
        tokens = unit(view.tokens.features)
        asked = view.asked[self.query]
        asked = asked / asked.sum(-1, keepdim=True)
        # The mean of cosines is the product with the mean of rows of length one.
        likeness = tokens @ (asked[:, None] @ unit(view.question)).mT
        lowest, highest = likeness.amin(1, keepdim=True), likeness.amax(1, keepdim=True)
        matters = (likeness - lowest) / (highest - lowest + NARROW)
        rows = tokens * matters
        return dpp_rows(rows @ rows.mT, count)

    def numpy(self, view: View[np.ndarray], scores: np.ndarray | None, count: int) -> np.ndarray:
        """By definition: at every step the determinants with each token that is left."""
        import numpy as np

        assert view.question is not None
        words = numpy_unit(view.question[0].astype(np.float64))
        asked = view.asked[self.query][0] / view.asked[self.query][0].sum()
        found = []
        for features in view.tokens.features.astype(np.float64):
            rows = numpy_unit(features)
            likeness = np.average(rows @ words.T, axis=1, weights=asked)
            matters = (likeness - likeness.min()) / (np.ptp(likeness) + NARROW)
            kernel = np.outer(matters, matters) * (rows @ rows.T)
            chosen: list[int] = []
            while len(chosen) < count:
                left = [row for row in range(len(rows)) if row not in chosen]
                spanned = [
                    np.linalg.slogdet(kernel[np.ix_([*chosen, row], [*chosen, row])])[1]
                    for row in left
                ]
                chosen.append(left[int(np.argmax(spanned))])
            found.append(sorted(chosen))
        return np.array(found, np.int64)
