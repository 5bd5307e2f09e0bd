"""Boxes around what a map of scores points at, by hand and against a slow definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgevlm_runtime.errors import InputError
from edgevlm_runtime.images.region import attended_box


def spots(height: int, width: int, **cells: float) -> np.ndarray:
    """Zeros but for some cells, named r1c2."""
    found = np.zeros((height, width))
    for name, value in cells.items():
        row, column = name[1:].split("c")
        found[int(row), int(column)] = value
    return found


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("size", [(640, 480), (30, 90), (8, 8)])
def test_a_map_that_prefers_nothing_keeps_the_whole_picture(
    value: float, size: tuple[int, int]
) -> None:
    """Two questions that attend alike leave a quotient of one everywhere."""
    box = attended_box(np.full((6, 8), value), size, top_p=0.2)
    assert box == (0, 0, *size)


@pytest.mark.parametrize(
    ("scores", "size", "options", "box"),
    [
        # one cell of a 4 x 4 map over 80 x 80 pixels
        (spots(4, 4, r1c2=1), (80, 80), {"top_p": 0.05}, (40, 20, 60, 40)),
        # two regions: the one that scores more together, whatever the best cell is
        (
            spots(4, 4, r0c0=5, r2c2=3, r2c3=3),
            (80, 80),
            {"top_p": 3 / 16, "aspect": 2.0},
            (40, 40, 80, 60),
        ),
        # both of them
        (
            spots(4, 4, r0c0=5, r2c2=3, r2c3=3),
            (80, 80),
            {"top_p": 3 / 16, "regions": 2},
            (0, 0, 80, 80),
        ),
        # cells that touch at a corner are one region
        (spots(5, 5, r1c1=1, r2c2=1), (50, 50), {"top_p": 2 / 25}, (10, 10, 30, 30)),
        # widened to the picture's shape around its middle
        (spots(4, 4, r1c1=1), (160, 80), {"top_p": 0.05}, (40, 20, 80, 40)),
        (spots(8, 8, r3c2=1, r3c3=1), (80, 80), {"top_p": 2 / 64}, (20, 25, 40, 45)),
        # moved back into the picture, and no larger than it
        (spots(8, 8, r0c6=1, r0c7=1), (80, 80), {"top_p": 2 / 64}, (60, 0, 80, 20)),
        (
            spots(4, 8, **{f"r0c{column}": 1.0 for column in range(8)}),
            (80, 40),
            {"top_p": 0.25, "aspect": 1.0},
            (0, 0, 80, 40),
        ),
        # places that are no whole pixels are taken whole
        (spots(3, 3, r1c1=1), (10, 10), {"top_p": 0.1}, (3, 3, 7, 7)),
    ],
)
def test_boxes(
    scores: np.ndarray,
    size: tuple[int, int],
    options: dict[str, float],
    box: tuple[int, int, int, int],
) -> None:
    assert attended_box(scores, size, **options) == box  # type: ignore[arg-type]


def slow_box(scores: np.ndarray, top_p: float, regions: int) -> tuple[int, int, int, int]:
    """Cells of the best regions by flooding a set of cells, one cell a pixel."""
    ranked = sorted(scores.ravel().tolist(), reverse=True)
    least = ranked[max(1, math.ceil(top_p * scores.size)) - 1]
    left = {tuple(cell) for cell in np.argwhere(scores >= least).tolist()}
    parts: list[set[tuple[int, ...]]] = []
    while left:
        part, front = set(), {left.pop()}
        while front:
            row, column = cell = front.pop()
            part.add(cell)
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            front |= near
        parts.append(part)
    parts.sort(key=lambda part: -sum(scores[cell] for cell in part))
    cells = np.array([cell for part in parts[:regions] for cell in part])
    (top, low_left), (bottom, right) = cells.min(0), cells.max(0) + 1
    return int(low_left), int(top), int(right), int(bottom)


@pytest.mark.parametrize("seed", range(20))
def test_regions_are_those_of_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.random((12, 9))
    top_p, regions = float(random.uniform(0.05, 0.5)), int(random.integers(1, 4))
    wanted = slow_box(scores, top_p, regions)
    # A cell is a pixel, and the shape asked for is the one there is.
    aspect = (wanted[2] - wanted[0]) / (wanted[3] - wanted[1])
    found = attended_box(scores, (9, 12), top_p=top_p, regions=regions, aspect=aspect)
    assert found == wanted


def test_a_box_is_within_the_picture() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        size = (int(random.integers(1, 50)), int(random.integers(1, 50)))
        shape = tuple(random.integers(1, 9, 2))
        left, top, right, bottom = attended_box(random.standard_normal(shape), size)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (np.zeros(4), {}, "a map of scores has the shape [4], expected [height, width]"),
        (np.zeros((0, 4)), {}, "a map of scores has the shape [0, 4], expected [height, width]"),
        (np.array([[np.nan]]), {}, "a map of scores has numbers that are not finite"),
        (np.ones((2, 2)), {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        (np.ones((2, 2)), {"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        (np.ones((2, 2)), {"regions": 0}, "regions must be at least 1, got 0"),
        (np.ones((2, 2)), {"aspect": 0.0}, "aspect must be above 0 and finite, got 0.0"),
    ],
)
def test_refusals(scores: np.ndarray, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError) as error:
        attended_box(scores, (8, 8), **options)  # type: ignore[arg-type]
    assert str(error.value) == message
