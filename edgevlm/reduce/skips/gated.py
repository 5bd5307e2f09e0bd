"""What a layer adds to a token is multiplied by its score (VideoLLM-MoD, arXiv 2408.16730).

A token that passes becomes h + s F(h), where F(h) is what attention and MLP add; the MLP sees what
attention made of the token whole. One that skips stays as it is. Text passes with s = 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from edgevlm.reduce.piece import Skip, register
from edgevlm.reduce.weighing import Weighing

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["Gated"]


@register
class Gated(Skip):
    """Both things that a layer adds are weighed alike."""

    name: ClassVar[str] = "gated"

    def torch(self, scores: Tensor) -> Weighing[Tensor]:
        """The scores [P, N] themselves."""
        return Weighing(attention=scores, mlp=scores)

    def numpy(self, scores: np.ndarray) -> Weighing[np.ndarray]:
        """The same."""
        return Weighing(attention=scores, mlp=scores)
