"""The sizes a picture goes through: pure arithmetic, in transformers' own order of rounding."""

from __future__ import annotations

import math

from edgevlm_runtime.errors import InputError
from edgevlm_runtime.images.spec import NativeGeometry

# The largest side that Idefics3's processor ever resizes to.
_TILED_MAX_SIDE = 4096
_NATIVE_MAX_ASPECT = 200


def shortest_edge_size(height: int, width: int, edge: int) -> tuple[int, int]:
    """Height and width with the shorter side `edge`, the longer one rounded down."""
    longer = int(edge * max(height, width) / min(height, width))
    return (longer, edge) if width <= height else (edge, longer)


def longest_edge_size(height: int, width: int, edge: int) -> tuple[int, int]:
    """Height and width with the longer side `edge`, the shorter one even, neither above 4096."""
    aspect = width / height
    if width >= height:
        width, height = edge, int(edge / aspect)
        height += height % 2
    else:
        height, width = edge, int(edge * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)

    aspect = width / height
    if width >= height and width > _TILED_MAX_SIDE:
        width, height = _TILED_MAX_SIDE, int(_TILED_MAX_SIDE / aspect)
    elif height > width and height > _TILED_MAX_SIDE:
        height, width = _TILED_MAX_SIDE, int(_TILED_MAX_SIDE * aspect)
    return max(height, 1), max(width, 1)


def tiled_size(height: int, width: int, tile: int) -> tuple[int, int]:
    """Height and width rounded up to multiples of `tile`, the longer side first."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return height, width


def smart_grid(height: int, width: int, geometry: NativeGeometry) -> tuple[int, int]:
    """The patch grid (height, width) that a picture of this size calls for."""
    aspect = max(height, width) / min(height, width)
    if aspect > _NATIVE_MAX_ASPECT:
        raise InputError(
            f"picture is {width} x {height}, one side {aspect:.0f} times the other, "
            f"at most {_NATIVE_MAX_ASPECT} times is read"
        )
    factor = geometry.patch * geometry.merge
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > geometry.max_pixels:
        shrink = math.sqrt(height * width / geometry.max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < geometry.min_pixels:
        grow = math.sqrt(geometry.min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height // geometry.patch, new_width // geometry.patch


def nearest_grid(wanted: tuple[int, int], geometry: NativeGeometry) -> tuple[int, int]:
    """The grid of the geometry that is nearest in shape and area, the first of equals."""

    def distance(grid: tuple[int, int]) -> float:
        return math.log(grid[0] / wanted[0]) ** 2 + math.log(grid[1] / wanted[1]) ** 2

    return min(geometry.grids, key=distance)
