"""The tokens of the best scores, with evenly spaced ones before all others where they are asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from edgevlm.document import Complaint
from edgevlm.reduce.lattice import lattice_rows, spaced_rows
from edgevlm.reduce.piece import Choice, Site, StaticClass, register

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
    by_score: ClassVar[bool] = True
    sites: ClassVar[tuple[Site, ...]] = ("input", "encoder", "projector", "decoder")

    lattice: int | None = Field(
        None,
        ge=2,
        description="Every so many rows and columns of the grid are kept whatever they score "
        "(FEATHER); of the tokens asked for, so that their number stays fixed.",
    )
    uniform_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="This share of what is kept are evenly spaced tokens, whatever they score "
        "(PruMerge+).",
    )

    @model_validator(mode="after")
    def _is_spaced_in_one_way(self) -> Top:
        if self.lattice is not None and self.uniform_share is not None:
            raise Complaint(
                "a lattice and a uniform share are two ways to keep evenly spaced tokens",
                hint="remove one of them",
            )
        return self

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
        first = self._first(view, count)
        if first:
            scores = scores + torch.tensor([FIRST * (n in first) for n in range(scores.shape[1])])
        kept, _ = top_rows(scores, count, view.dense)
        return kept

    def numpy(self, view: View[np.ndarray], scores: np.ndarray | None, count: int) -> np.ndarray:
        """Sort, cut, sort."""
        import numpy as np

        assert scores is not None
        found = []
        first = self._first(view, count)
        for row in scores:
            order = [i for i in np.argsort(-row, kind="stable") if i not in first]
            found.append(sorted([*first, *order][:count]))
        return np.array(found, np.int64)

    def _first(self, view: View[Tensor] | View[np.ndarray], count: int) -> list[int]:
        """The tokens that are kept whatever they score."""
        grid = view.tokens.grid
        if self.lattice is not None:
            assert grid is not None, "checked when the stage was sized"
            return lattice_rows(grid, self.lattice)
        if self.uniform_share is not None:
            number = max(1, round(self.uniform_share * count))
            return spaced_rows(grid, view.tokens.features.shape[1], number)
        return []
