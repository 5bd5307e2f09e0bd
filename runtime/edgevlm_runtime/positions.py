"""Where the rows of a prompt stand for the rotary embedding: one number per row, or three.

Text counts on by one, on all axes alike. The visual tokens of a picture group (one call of the
vision graph) stand at offsets from where the group begins, and the group moves the position on by
its span. Offsets and span are those of the picture's layout, or of a graph that has seen it, and
where neither says anything those of the bundle's rule: `sequential` counts visual tokens as text;
`mrope` spreads them over rows and columns, and moves on by the longer side (Qwen2-VL).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm_runtime.errors import BundleError
from edgevlm_runtime.images.spec import ImageLayout

__all__ = ["AXES", "Positions", "placed_positions"]

AXES: Mapping[str, int] = {"sequential": 1, "mrope": 3}
"""The rules, with the numbers of a position."""

Positions = NDArray[np.int64] | NDArray[np.float64]

# T rows of the prompt, k visual tokens of a group, A axes


def placed_positions(
    num_rows: int,
    image_rows: NDArray[np.int64],
    layouts: Sequence[ImageLayout],
    rule: str,
    offsets: Sequence[NDArray[Any]] | None = None,
) -> tuple[Positions, float]:
    """Positions [T], or [A, T] for several axes, and that of the row after them.

    `offsets` has an array [k, A] for every picture group of the prompt, in order, and takes the
    place of those of the layouts. Positions are int64, or float64 where one of them is a fraction.
    """
    num_axes = AXES[rule]
    positions = np.empty((num_axes, num_rows))
    position, row, first = 0.0, 0, 0
    groups = [(layout, num_tokens) for layout in layouts for num_tokens in layout.tokens]
    for index, (layout, num_tokens) in enumerate(groups):
        start = int(image_rows[first])
        positions[:, row:start] = np.arange(start - row) + position
        position += start - row
        given = layout.offsets if offsets is None else offsets[index]
        places = _offsets(layout, num_tokens, rule) if given is None else np.asarray(given)
        if places.shape != (num_tokens, num_axes):
            raise BundleError(
                f"offsets of {num_tokens} visual tokens have the shape {list(places.shape)}, "
                f"positions of the rule {rule!r} take {[num_tokens, num_axes]}",
                hint="compile the bundle again",
            )
        row, first = start + num_tokens, first + num_tokens
        positions[:, start:row] = places.T + position
        position += _span(layout, num_tokens, rule, is_given=given is not None)
    positions[:, row:] = np.arange(num_rows - row) + position
    position += num_rows - row
    following = int(position) if position.is_integer() else position
    placed = positions[0] if num_axes == 1 else positions
    if (placed == np.rint(placed)).all():
        return placed.astype(np.int64), following
    return placed, following


def _offsets(layout: ImageLayout, num_tokens: int, rule: str) -> NDArray[np.int64]:
    """Offsets [k, A] by the rule."""
    if rule == "sequential":
        return np.arange(num_tokens)[:, None]
    height, width = _grid(layout, num_tokens)
    down, right = np.repeat(np.arange(height), width), np.tile(np.arange(width), height)
    return np.stack([np.zeros_like(down), down, right], axis=1)


def _span(layout: ImageLayout, num_tokens: int, rule: str, *, is_given: bool) -> float:
    """How far a group moves the position on."""
    if layout.span is not None:
        return layout.span
    if rule == "sequential":
        return num_tokens
    if is_given:
        raise BundleError(
            f"a picture of {num_tokens} visual tokens has offsets and no span of positions",
            hint="compile the bundle again",
        )
    return max(_grid(layout, num_tokens))


def _grid(layout: ImageLayout, num_tokens: int) -> tuple[int, int]:
    """Height and width of the visual tokens of a picture."""
    if layout.token_grid is None or num_tokens != math.prod(layout.token_grid):
        raise BundleError(
            f"a picture of {layout.num_tokens} visual tokens has no grid of positions"
        )
    return layout.token_grid
