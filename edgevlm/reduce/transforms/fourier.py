"""Low frequencies of the grid (Fourier-VLM, arXiv 2508.06038): a cosine transform, cut, and back.

Per side the map is sqrt(k / n) C_k^T [I 0] C_n with orthonormal DCT-II matrices C, one constant
matrix instead of two transforms. The root makes a constant picture map to itself.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from edgevlm.reduce.lattice import similar_grid
from edgevlm.reduce.piece import Site, Transform, register


@register
class Fourier(Transform):
    """The lowest k of n frequencies of each side."""

    name: ClassVar[str] = "fourier"
    sites: ClassVar[tuple[Site, ...]] = ("encoder", "projector")

    preserve_mean: bool = Field(True, description="A constant maps to itself; else orthonormal.")

    def grid(self, grid: tuple[int, int], count: int) -> tuple[int, int]:
        """The grid of the same shape, as near as whole numbers come."""
        return similar_grid(grid, count)

    def matrix(self, old: int, new: int) -> np.ndarray:
        """Forth, cut, and back in the smaller size."""
        found: np.ndarray = cosines(new).T @ np.eye(new, old) @ cosines(old)
        return found * np.sqrt(new / old) if self.preserve_mean else found


def cosines(size: int) -> np.ndarray:
    """The orthonormal DCT-II matrix [frequency, place] float64."""
    frequency, place = np.arange(size)[:, None], np.arange(size)
    found: np.ndarray = np.sqrt(2 / size) * np.cos(np.pi * (2 * place + 1) * frequency / (2 * size))
    found[0] /= np.sqrt(2)
    return found
