"""Attention that a visual token receives from text in a decoder layer, by recomputed probe rows.

FastV reads the layer before the cut, from the last row (arXiv 2403.06764); PyramidDrop and DUET the
layer behind it (arXiv 2410.17247); FEATHER leaves the rotation out of the scores, because rotated
ones prefer the rows nearest to the question whatever they show (arXiv 2412.13180); SparseVLM 2
divides by what rotation alone would give (arXiv 2410.04417).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from edgevlm.document import Complaint, show
from edgevlm.reduce.attending import numpy_text_scores, text_scores
from edgevlm.reduce.piece import Scorer, Site, StaticClass, register

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.view import View


def _heads(value: object) -> int | float:
    """A number of heads, or a share of them."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if is_number or (isinstance(value, float) and 0 < value < 1):
        return value  # type: ignore[return-value]
    raise Complaint(
        f"top_heads must be a number of heads, or a share below 1, got {show(value)}",
        hint="write 14, or 0.5",
    )


Heads = Annotated[
    int | float,
    PlainValidator(_heads),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            ]
        }
    ),
]


@register
class TextAttention(Scorer):
    """Softmax attention over the rows of the call, mean over heads, weighted by who asks."""

    name: ClassVar[str] = "text_attention"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("decoder",)

    layer: Literal["own", "previous"] = Field(
        "own", description="The layer behind the cut, or the one before it."
    )
    query: Literal["last", "text", "question", "words", "raters"] = "last"
    rope: Literal["on", "off", "corrected"] = Field(
        "on", description="Rotated, not rotated, or divided by what rotation alone gives."
    )
    top_heads: Heads | None = Field(
        None,
        description="Only the heads that look at the pictures most, a number or a share of them; "
        "absent: all.",
    )

    @property
    def needs(self) -> frozenset[str]:
        """Attention, and weights of text rows."""
        return frozenset({"attention"} if self.query == "last" else {"attention", "question"})

    @property
    def looks_back(self) -> bool:
        """Where the layer is the previous one."""
        return self.layer == "previous"

    @property
    def looks_here(self) -> bool:
        """Where the layer is the own one."""
        return self.layer == "own"

    def torch(self, view: View[Tensor]) -> Tensor:
        """Probe rows are the last one, or every row by its weight."""
        return text_scores(view, self.layer, self.query, self.rope, self.top_heads)

    def numpy(self, view: View[np.ndarray]) -> np.ndarray:
        """Row by row and head by head."""
        return numpy_text_scores(view, self.layer, self.query, self.rope, self.top_heads)
