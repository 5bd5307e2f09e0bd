"""One learned number of each token: which of them pass a layer (Mixture-of-Depths).

p-MoD (arXiv 2412.04449) has a bias and begins with zeros, so that all tokens are alike; what
VideoLLM-MoD (arXiv 2408.16730) begins with is not published, and with `start: normal` it is an
ordinary linear map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from edgevlm.reduce.learned import Weight, learned, numpy_learned
from edgevlm.reduce.piece import Scorer, Site, StaticClass, register

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View

__all__ = ["Router"]


@register
class Router(Scorer):
    """The product of a token with a learned row, and a learned number besides."""

    name: ClassVar[str] = "router"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("decoder",)
    is_learned: ClassVar[bool] = True

    bias: bool = Field(True, description="Whether a learned number is added.")
    start: Literal["zeros", "normal"] = Field("zeros", description="What training begins with.")

    def weights(self, extent: Extent) -> Mapping[str, Weight]:
        """A row as wide as tokens, and one number."""
        found = {"row": Weight(shape=(extent.width, 1), start=self.start)}
        if self.bias:
            found["bias"] = Weight(shape=(1,), start="zeros")
        return found

    def macs(self, extent: Extent) -> int:
        """One product for each token."""
        return extent.groups * extent.tokens * extent.width

    def torch(self, view: View[Tensor]) -> Tensor:
        """Scores [P, N] of tokens [P, N, W]."""
        weights = learned(view, self.name)
        scores = view.tokens.features @ weights["row"]
        if self.bias:
            scores = scores + weights["bias"]
        return scores.flatten(1)

    def numpy(self, view: View[np.ndarray]) -> np.ndarray:
        """Number by number, in float64."""
        weights = numpy_learned(view, self.name)
        found: np.ndarray = np.einsum("pnw,w->pn", view.tokens.features, weights["row"][:, 0])
        return found + weights["bias"] if self.bias else found
