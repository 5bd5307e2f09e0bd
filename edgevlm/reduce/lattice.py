"""Evenly spaced tokens of a grid, which depend on nothing but their number."""

from __future__ import annotations

import math


def lattice_rows(grid: tuple[int, int], step: int) -> list[int]:
    """Rows of the tokens at every `step`-th row and column, counted from half a step in."""
    height, width = grid
    start = (step - 1) // 2
    return [
        row * width + column
        for row in range(min(start, height - 1), height, step)
        for column in range(min(start, width - 1), width, step)
    ]


def similar_grid(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """The grid of at most `count` tokens that is most like this one."""
    height, width = grid

    def fitness(rows: int) -> tuple[int, float]:
        columns = min(width, count // rows)
        return rows * columns, -abs(math.log(rows * width / (columns * height)))

    rows = max(range(1, min(height, count) + 1), key=fitness)
    shaped = max(proportional_grids(grid, count), key=math.prod, default=None)
    # A grid of the same shape, where it holds nearly as many; else whatever holds the most.
    if shaped is not None and math.prod(shaped) >= 0.9 * count:
        return shaped
    return rows, min(width, count // rows)


def spaced(length: int, count: int) -> list[int]:
    """`count` of `length` places: the middles of equal shares."""
    return [(2 * place + 1) * length // (2 * count) for place in range(count)]


def proportional_grids(grid: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """The grids of at most `count` tokens that have the same shape, as near as whole numbers go."""
    height, width = grid
    return [
        (rows, columns)
        for rows in range(1, height + 1)
        for columns in (round(rows * width / height),)
        if 1 <= columns <= width and rows * columns <= count
    ]


def centres(old: tuple[int, int], new: tuple[int, int]) -> list[int]:
    """The tokens of a grid that those of a coarser one stand for: where their middles lie."""
    return [
        row * old[1] + column for row in spaced(old[0], new[0]) for column in spaced(old[1], new[1])
    ]


def spaced_rows(grid: tuple[int, int] | None, num_tokens: int, count: int) -> list[int]:
    """Rows of `count` tokens, evenly spaced: on a grid of their own where one has that many."""
    if grid is not None:
        rows, columns = similar_grid(grid, count)
        if rows * columns == count:
            down, across = spaced(grid[0], rows), spaced(grid[1], columns)
            return [row * grid[1] + column for row in down for column in across]
    return spaced(num_tokens, count)
