"""Tokens that lie far apart: greedy max-min of cosine distance (DivPrune, arXiv 2503.02175)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from edgevlm.reduce.piece import Choice, StaticClass, register
from edgevlm.reduce.view import numpy_unit, unit

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View


@register
class Spread(Choice):
    """First the token whose nearest other is farthest, then whatever is farthest from all kept."""

    name: ClassVar[str] = "spread"
    static_class: ClassVar[StaticClass] = "S2"

    def macs(self, extent: Extent) -> int:
        """Every token by every token."""
        return extent.groups * extent.tokens**2 * extent.width

    def torch(self, view: View[Tensor], scores: Tensor | None, count: int) -> Tensor:
        """All distances once, then a vector of nearest distances."""
        from edgevlm_export.ops import spread_rows

        rows = unit(view.tokens.features)
        return spread_rows(1.0 - rows @ rows.mT, count)

    def numpy(self, view: View[np.ndarray], scores: np.ndarray | None, count: int) -> np.ndarray:
        """By definition: at every step the distances to all that are kept."""
        import numpy as np

        found = []
        for features in view.tokens.features:
            rows = numpy_unit(features)
            distance = 1.0 - rows @ rows.T
            np.fill_diagonal(distance, np.inf)
            chosen = [int(distance.min(1).argmax())]
            while len(chosen) < count:
                nearest = distance[:, chosen].min(1)
                nearest[chosen] = -np.inf
                chosen.append(int(nearest.argmax()))
            found.append(sorted(chosen))
        return np.array(found, np.int64)
