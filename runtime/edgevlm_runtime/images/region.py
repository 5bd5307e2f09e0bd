"""The part of a picture that a map of scores points at, as a box to cut out.

After CARVE (arXiv 2509.06461), which looks a second time at what a question drew attention to: the
best places of the map are joined to regions, and the largest of these, by what they score together,
are kept in one box. A map that prefers nothing keeps the whole picture.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgevlm_runtime.errors import InputError

__all__ = ["attended_box"]

# h x w places of the map

Box = tuple[int, int, int, int]


def attended_box(
    scores_hw: NDArray[np.floating],
    size: tuple[int, int],
    *,
    top_p: float = 0.2,
    regions: int = 1,
    aspect: float | None = None,
) -> Box:
    """The box (left, top, right, bottom) on a picture of `size` (width, height), as Pillow's crop.

    The best share `top_p` of the places counts, ties and all, and of the regions of places that
    touch the best so many. The box is widened around its centre to `aspect`, width over height,
    the picture's own by default, as far as the picture goes.
    """
    _check(scores_hw, top_p, regions, aspect)
    height, width = scores_hw.shape
    count = max(1, math.ceil(top_p * scores_hw.size))
    least = np.sort(scores_hw, axis=None)[-count]
    labels_hw, number = _labelled(scores_hw >= least)
    # Scores below nothing would make a large region a bad one.
    above = scores_hw - min(0.0, float(scores_hw.min()))
    sums = [float(above[labels_hw == label].sum()) for label in range(1, number + 1)]
    best = sorted(range(number), key=lambda label: -sums[label])[:regions]
    rows, columns = np.nonzero(np.isin(labels_hw, [1 + label for label in best]))
    across, down = size[0] / width, size[1] / height
    box = (
        math.floor(columns.min() * across),
        math.floor(rows.min() * down),
        math.ceil((columns.max() + 1) * across),
        math.ceil((rows.max() + 1) * down),
    )
    return _widened(box, size, size[0] / size[1] if aspect is None else aspect)


def _check(
    scores_hw: NDArray[np.floating], top_p: float, regions: int, aspect: float | None
) -> None:
    if scores_hw.ndim != 2 or not scores_hw.size:
        raise InputError(
            f"a map of scores has the shape {list(scores_hw.shape)}, expected [height, width]"
        )
    if not np.isfinite(scores_hw).all():
        raise InputError("a map of scores has numbers that are not finite")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, got {top_p}")
    if regions < 1:
        raise InputError(f"regions must be at least 1, got {regions}")
    if aspect is not None and not 0 < aspect < math.inf:
        raise InputError(f"aspect must be above 0 and finite, got {aspect}")


def _labelled(mask_hw: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Regions of places that touch at sides or corners, numbered from 1, and how many there are."""
    labels_hw = np.zeros(mask_hw.shape, np.int64)
    number = 0
    for start in zip(*np.nonzero(mask_hw), strict=True):
        if labels_hw[start]:
            continue
        number += 1
        labels_hw[start] = number
        reached = [start]
        while reached:
            row, column = reached.pop()
            around = np.s_[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            fresh = mask_hw[around] & (labels_hw[around] == 0)
            labels_hw[around][fresh] = number
            rows, columns = np.nonzero(fresh)
            reached += list(zip(rows + max(row - 1, 0), columns + max(column - 1, 0), strict=True))
    return labels_hw, number


def _widened(box: Box, size: tuple[int, int], aspect: float) -> Box:
    """The box grown to a shape, moved back into the picture where it would reach out of it."""
    left, top, right, bottom = box
    width = max(right - left, round((bottom - top) * aspect))
    height = max(bottom - top, round((right - left) / aspect))
    left, right = _placed(left, right, min(width, size[0]), size[0])
    top, bottom = _placed(top, bottom, min(height, size[1]), size[1])
    return left, top, right, bottom


def _placed(begin: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """An interval of a length around the middle of another one, within 0 and a limit."""
    first = min(max(0, (begin + end - length) // 2), limit - length)
    return first, first + length
