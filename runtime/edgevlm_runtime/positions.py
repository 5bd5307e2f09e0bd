"""Where the rows of a prompt stand for the rotary embedding: one number per row, or several.

Text counts on by one, on all axes alike. The visual tokens of a picture group (one call of the
vision graph) stand at offsets from where the group begins, and the group moves the position on by
its span. Offsets and span are those of the picture's layout, or of a graph that has seen it, and
where neither says anything those of the bundle's rule: `sequential` counts visual tokens as text;
`mrope` spreads them over rows and columns, and moves on by the longer side (Qwen2-VL). Visual
tokens that are fewer than their grid has places count as text there too, and want a span.

A rule has one axis or three. The rotary embedding may turn with several times as many, as many for
each of the rule's in turn: then a graph gives a visual token several places (PPE), and whatever has
one has it on all of them.
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
"""The rules, with the numbers of a position that they tell apart."""

Positions = NDArray[np.int64] | NDArray[np.float64]

# T rows of the prompt, k visual tokens of a group, A axes


def placed_positions(
    num_rows: int,
    image_rows: NDArray[np.int64],
    layouts: Sequence[ImageLayout],
    rule: str,
    offsets: Sequence[NDArray[Any]] | None = None,
    num_axes: int | None = None,
) -> tuple[Positions, float]:
    """Positions [T], or [A, T] for several axes, and that of the row after them.

    `offsets` has an array [k, A] for every picture group of the prompt, in order, and takes the
    place of those of the layouts. `num_axes` are those of the rotary embedding, the rule's own
    where it is not given. Positions are int64, or float64 where one of them is a fraction.
    """
    num_axes = AXES[rule] if num_axes is None else num_axes
    if num_axes % AXES[rule]:
        raise BundleError(
            f"the rotary embedding turns with {num_axes} axes, which are not so many for each of "
            f"the {AXES[rule]} of the rule {rule!r}",
            hint="compile the bundle again",
        )
    positions = np.empty((num_axes, num_rows))
    position, row, first = 0.0, 0, 0
    groups = [(layout, num_tokens) for layout in layouts for num_tokens in layout.tokens]
    for index, (layout, num_tokens) in enumerate(groups):
        start = int(image_rows[first])
        positions[:, row:start] = np.arange(start - row) + position
        position += start - row
        given = layout.offsets if offsets is None else offsets[index]
        if given is None:
            by_rule = _offsets(layout, num_tokens, rule)
            places = np.repeat(by_rule, num_axes // AXES[rule], axis=1)
        else:
            places = np.asarray(given)
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
    """Offsets [k, A] by the rule, for the axes that it tells apart."""
    in_turn = np.repeat(np.arange(num_tokens)[:, None], AXES[rule], axis=1)
    if rule == "sequential" or (layout.span is not None and not _is_whole(layout, num_tokens)):
        return in_turn
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
    if layout.token_grid is None or not _is_whole(layout, num_tokens):
        raise BundleError(
            f"a picture of {layout.num_tokens} visual tokens has no grid of positions"
        )
    return layout.token_grid


def _is_whole(layout: ImageLayout, num_tokens: int) -> bool:
    """Whether there is a visual token for each place of the grid."""
    return layout.token_grid is not None and num_tokens == math.prod(layout.token_grid)
