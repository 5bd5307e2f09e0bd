"""Rotary positions of a prompt whose pictures have two axes: three numbers per row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgevlm_runtime.errors import BundleError
from edgevlm_runtime.images.spec import ImageLayout

# T rows of the prompt


def mrope_positions(
    num_rows: int, image_rows: NDArray[np.int64], layouts: Sequence[ImageLayout]
) -> NDArray[np.int64]:
    """Positions [3, T] (temporal, height, width), as Qwen2-VL counts them.

    A text row moves all three on by one. A picture of h x w visual tokens stands at one temporal
    position, spreads over h and w positions, and moves all three on by the larger of the two.
    """
    positions = np.empty((3, num_rows), np.int64)
    row, position, first = 0, 0, 0
    for layout in layouts:
        if layout.token_grid is None or layout.num_tokens != math.prod(layout.token_grid):
            raise BundleError(
                f"a picture of {layout.num_tokens} visual tokens has no grid of positions"
            )
        height, width = layout.token_grid
        start = int(image_rows[first])
        positions[:, row:start] = np.arange(position, position + start - row)
        position += start - row
        end = start + layout.num_tokens
        positions[0, start:end] = position
        positions[1, start:end] = position + np.repeat(np.arange(height), width)
        positions[2, start:end] = position + np.tile(np.arange(width), height)
        position += max(height, width)
        row, first = end, first + layout.num_tokens
    positions[:, row:] = np.arange(position, position + num_rows - row)
    return positions
