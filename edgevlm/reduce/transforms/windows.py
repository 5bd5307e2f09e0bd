"""Windows of 2 x 2 inside the encoder: progressive compression (LLaVA-UHD v3, arXiv 2511.21150).

Behind some of the encoder's layers every window of 2 x 2 tokens becomes their mean, and later
layers see a grid of half the sides. A mean stands for one place of a coarser picture, and not for
four tokens: attention does not weigh it by its size, as it does tokens that were merged by ToMe.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from edgevlm.document import Complaint
from edgevlm.reduce.piece import Site, Transform, register


@register
class Windows(Transform):
    """As many windows as it takes, one behind each of the last of the layers that are named."""

    name: ClassVar[str] = "windows"
    sites: ClassVar[tuple[Site, ...]] = ("encoder.layers",)

    def grid(self, grid: tuple[int, int], count: int) -> tuple[int, int]:
        """The grid behind the last of them."""
        return self.steps(grid, count)[-1]

    def steps(self, grid: tuple[int, int], count: int) -> tuple[tuple[int, int], ...]:
        """Half the sides, as often as it takes to leave at most so many tokens."""
        found: list[tuple[int, int]] = []
        height, width = grid
        while height * width > count:
            if height % 2 or width % 2:
                raise Complaint(
                    f"a grid of {height} x {width} tokens has no whole windows of 2 x 2, and "
                    f"{count} of its {height * width} are to be left",
                    hint="pool behind the encoder: write at: encoder, transform: elastic",
                )
            height, width = height // 2, width // 2
            found.append((height, width))
        # Where all are kept, one stage maps the grid to itself.
        return tuple(found) or (grid,)

    def matrix(self, old: int, new: int) -> np.ndarray:
        """Means of as many as become one."""
        return np.kron(np.eye(new), np.full((1, old // new), new / old))
