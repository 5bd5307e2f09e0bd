"""The tokens of the best scores, with a lattice of tokens before all others where one is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgevlm.document import Complaint
from edgevlm.reduce.lattice import lattice_rows
from edgevlm.reduce.piece import Choice, StaticClass, register

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View

FIRST = 1e9
"""More than any score: what comes first whatever it scores."""


@register
class Top(Choice):
    """Exactly so many tokens; ties go to the first."""

    name: ClassVar[str] = "top"
    static_class: ClassVar[StaticClass] = "S1"

    lattice: int | None = Field(
        None,
        ge=2,
        description="Every so many rows and columns of the grid are kept whatever they score "
        "(FEATHER); of the tokens asked for, so that their number stays fixed.",
    )

    @property
    def needs(self) -> frozenset[str]:
        """A grid, for a lattice."""
        return frozenset() if self.lattice is None else frozenset({"grid"})

    def macs(self, extent: Extent) -> int:
        """None, unless it works without sorting."""
        return extent.groups * extent.chosen_macs(extent.tokens, extent.kept - extent.extra)

    def check(self, grid: tuple[int, int], count: int) -> None:
        """Raise Complaint where the lattice alone is more than is kept."""
        if self.lattice is None:
            return
        held = len(lattice_rows(grid, self.lattice))
        if held > count:
            raise Complaint(
                f"a lattice of every {self.lattice} of {grid[0]} x {grid[1]} tokens holds {held}, "
                f"and {count} are kept",
                hint="keep more tokens, or widen the lattice",
            )

    def torch(self, view: View[Tensor], scores: Tensor | None, count: int) -> Tensor:
        """TopK, in ascending order of rows."""
        import torch

        from edgevlm_export.ops import top_rows

        assert scores is not None, "checked when the stage was resolved"
        if self.lattice is not None:
            assert view.tokens.grid is not None
            first = torch.zeros(scores.shape[1])
            first[lattice_rows(view.tokens.grid, self.lattice)] = FIRST
            scores = scores + first
        kept, _ = top_rows(scores, count, view.dense)
        return kept

    def numpy(self, view: View[np.ndarray], scores: np.ndarray | None, count: int) -> np.ndarray:
        """Sort, cut, sort."""
        import numpy as np

        assert scores is not None
        found = []
        for row in scores:
            first: list[int] = []
            if self.lattice is not None:
                assert view.tokens.grid is not None
                first = lattice_rows(view.tokens.grid, self.lattice)
            order = [i for i in np.argsort(-row, kind="stable") if i not in first]
            found.append(sorted([*first, *order][:count]))
        return np.array(found, np.int64)
