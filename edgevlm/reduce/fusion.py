"""What text sees of a picture before the decoder (the pre-fusion of LLaVA-Mini, arXiv 2501.03895).

Where a picture is left with a handful of tokens, a few layers of a decoder's kind first see all
visual tokens, those that are left, and the text, in this order and causally. What becomes of the
tokens that are left and of the text goes into the decoder; the others have been seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edgevlm.document import Complaint, Options

if TYPE_CHECKING:
    from edgevlm.model.spec import VlmSpec

__all__ = ["FusionOptions", "check_fusion"]


class FusionOptions(Options):
    """How much of it."""

    layers: int = Field(4, ge=1, description="Layers like the first of the decoder, learned.")
    rows: int = Field(
        64, ge=1, description="Rows of text that are fused: the last of the prompt's."
    )


def check_fusion(spec: VlmSpec) -> None:
    """Raise Complaint where text and pictures cannot be fused before the decoder."""
    if spec.decoder.rope.sections:
        raise Complaint(
            "fused rows stand on one axis, and visual tokens of this model on three",
            hint="remove fusion",
        )
    if spec.decoder.layers[0].mixer != "attention":
        raise Complaint(
            f"fused rows pass layers like the decoder's first, which is "
            f"{spec.decoder.layers[0].mixer!r}",
            hint="remove fusion",
        )
    assert spec.reduction is not None
    if spec.reduction.positions is not None or any(map(spec.keeps_places, spec.vision.grids)):
        raise Complaint(
            "fused rows count by one, and visual tokens have other positions",
            hint="remove positions and place: keep",
        )
    if spec.reduction.cuts or spec.reduction.skips:
        raise Complaint(
            "fused text has seen all visual tokens, and a stage within the decoder asks what it "
            "looks at",
            hint="put the stages before the decoder",
        )
