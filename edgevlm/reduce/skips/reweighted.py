"""Tokens that pass and tokens that skip are weighed alike, close to one (p-MoD, arXiv 2412.04449).

With w = 1 + gain tanh(s) a token that passes becomes a + w MLP(a), where a = h + Attention(h); one
that skips becomes w h. The paper calls w TanhNorm, and weighing both symmetric token reweighting
(STRing); both let training begin with the model as it was, where scores are zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgevlm.reduce.piece import Skip, register
from edgevlm.reduce.weighing import Weighing

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["Reweighted"]


@register
class Reweighted(Skip):
    """What the MLP adds, or the token itself."""

    name: ClassVar[str] = "reweighted"

    gain: float = Field(0.2, gt=0, lt=1, description="How far from one a weight may be.")

    def torch(self, scores: Tensor) -> Weighing[Tensor]:
        """Weights [P, N], one where scores are zero."""
        weights = self.gain * scores.tanh() + 1.0
        return Weighing(mlp=weights, skipped=weights)

    def numpy(self, scores: np.ndarray) -> Weighing[np.ndarray]:
        """The same by exponentials."""
        import numpy as np

        weights = 1.0 + self.gain * (1.0 - 2.0 / (np.exp(2.0 * scores) + 1.0))
        return Weighing(mlp=weights, skipped=weights)
