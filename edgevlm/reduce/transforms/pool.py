"""Means of windows of the grid: plain pooling, or windows of uneven size (TokenFLEX's elastic)."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from edgevlm.document import Complaint
from edgevlm.reduce.lattice import similar_grid
from edgevlm.reduce.piece import Site, Transform, register


@register
class AvgPool(Transform):
    """Windows of one size: sides must divide."""

    name: ClassVar[str] = "avgpool"
    sites: ClassVar[tuple[Site, ...]] = ("encoder", "projector")

    def grid(self, grid: tuple[int, int], count: int) -> tuple[int, int]:
        """The finest grid that windows of one size make, of at most so many tokens."""
        found = [
            (grid[0] // side, grid[1] // side)
            for side in range(1, min(grid) + 1)
            if grid[0] % side == 0 and grid[1] % side == 0
        ]
        fitting = [new for new in found if math.prod(new) <= count]
        if not fitting:
            raise Complaint(
                f"windows of a grid of {grid[0]} x {grid[1]} leave {math.prod(found[-1])} tokens "
                f"or more, {count} are asked",
                hint="keep more tokens, or choose elastic windows",
            )
        return fitting[0]

    def matrix(self, old: int, new: int) -> np.ndarray:
        """One over the window's side."""
        return np.kron(np.eye(new), np.full((1, old // new), new / old))


@register
class Elastic(Transform):
    """Adaptive windows, which may differ by one and overlap, so that any grid can be made."""

    name: ClassVar[str] = "elastic"
    sites: ClassVar[tuple[Site, ...]] = ("encoder", "projector")

    def grid(self, grid: tuple[int, int], count: int) -> tuple[int, int]:
        """The grid of the same shape, as near as whole numbers come."""
        return similar_grid(grid, count)

    def matrix(self, old: int, new: int) -> np.ndarray:
        """Window i reaches from floor(i * old / new) to ceil((i + 1) * old / new)."""
        found = np.zeros((new, old))
        for place in range(new):
            begin, end = place * old // new, -(-(place + 1) * old // new)
            found[place, begin:end] = 1.0 / (end - begin)
        return found
