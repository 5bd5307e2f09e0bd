"""Pictures of fewer patches: the resolution itself is what is reduced.

Pictures are made smaller before the model sees them. What remains to be mapped is the table of
learned positions, which bicubic interpolation takes to the new grid, as transformers does for
pictures of another size: Keys' kernel with a = -0.75, the borders repeated, without antialiasing.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from edgevlm.document import Complaint
from edgevlm.reduce.lattice import proportional_grids
from edgevlm.reduce.piece import Site, Transform, register

KEYS = -0.75


@register
class Resize(Transform):
    """The whole picture on a smaller grid of the same shape."""

    name: ClassVar[str] = "resize"
    sites: ClassVar[tuple[Site, ...]] = ("input",)

    def grid(self, grid: tuple[int, int], count: int) -> tuple[int, int]:
        """The largest grid of the same shape, so that nothing is squeezed."""
        found = proportional_grids(grid, max(count, 0))
        if not found:
            raise Complaint(
                f"no grid of the shape of {grid[0]} x {grid[1]} patches has {count} or fewer",
                hint="keep more tokens",
            )
        return max(found, key=math.prod)

    def matrix(self, old: int, new: int) -> np.ndarray:
        """Four taps of a side's table for each place."""
        found = np.zeros((new, old))
        for place in range(new):
            centre = (place + 0.5) * old / new - 0.5
            first = math.floor(centre)
            for tap in range(first - 1, first + 3):
                found[place, min(max(tap, 0), old - 1)] += _weight(abs(centre - tap))
        return found


def _weight(distance: float) -> float:
    """Keys' kernel."""
    if distance <= 1:
        return ((KEYS + 2) * distance - (KEYS + 3)) * distance**2 + 1
    return KEYS * (((distance - 5) * distance + 8) * distance - 4)
