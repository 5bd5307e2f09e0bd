"""Fold the weights of norms into the linear maps that read them, and leave ones behind.

    linear(w * x + b) = (W diag(w)) x + (W b + c)

A quantized linear then sees inputs of one scale, and a fused norm needs no weight of its own. The
outputs stay the same, up to rounding in float32. A norm is skipped where something else reads it:
a head tied to the embedding would change the embedding, and a hidden state that leaves the encoder
would leave it scaled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from edgevlm.passes.base import Change, Context, Foresight, Pass

if TYPE_CHECKING:
    from edgevlm.model.spec import VlmSpec
    from edgevlm.model.vlm import Vlm


class FoldNorms(Pass):
    """Norm weights move into the columns of the linear maps that read them."""

    name: ClassVar[str] = "fold_norms"
    lossless: ClassVar[bool] = True

    def foresee(self, spec: VlmSpec) -> Foresight:
        """Say that shapes stay; a linear map without bias gains one where the norm has a bias."""
        return Foresight(spec=spec, effect="weights change, shapes and outputs do not")

    def apply(self, model: Vlm, context: Context) -> Change:
        """Fold every norm whose readers are all linear maps of its own."""
        raise NotImplementedError
