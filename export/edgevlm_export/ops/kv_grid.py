"""The grids that keys and values of a quantized cache are rounded to, and how it stores them.

    dtype            a cache holds       a number is the scale times
    int8             int8 [.., D]        -128 .. 127
    int4             uint8 [.., D/2]     -8 .. 7, plus 8: the even feature in the lower half
    float8_e4m3fn    float8 [.., D]      up to 448, larger ones saturate
    float8_e5m2      float8 [.., D]      up to 57344, larger ones saturate

Rows are rounded, to the nearest with ties to even, before anything attends to them, those of the
own call too: GroupQueryAttention does so for a first prompt, a later chunk and a single row alike
(checked against float64 for each), which is why chunks and whole prompts agree. It multiplies by
the reciprocal of the scale, in float32, and so does this. A scale is [1], or [Hkv, 1, D] with one
for each feature of each head, and is not zero.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

LIMITS = {
    "int8": (-128, 127),
    "int4": (-8, 7),
    "float8_e4m3fn": (-448, 448),
    "float8_e5m2": (-57344, 57344),
}
FLOAT8 = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
_INT4_BIAS = 8


def stored(rows: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """Round float rows [B, Hkv, T, D] to what a cache of this dtype holds."""
    steps = (rows * (1 / scale)).clamp(*LIMITS[dtype])
    if dtype in FLOAT8:
        return steps.to(getattr(torch, dtype))
    codes = torch.round(steps)
    if dtype == "int8":
        return codes.to(torch.int8)
    codes = (codes + _INT4_BIAS).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def restored(cache: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """The float rows [B, Hkv, S, D] that a cache of this dtype stands for."""
    if dtype == "int4":
        codes = torch.stack((cache & 15, cache >> 4), dim=-1).flatten(-2)
        return (codes.float() - _INT4_BIAS) * scale
    return cache.float() * scale


def rounded(rows: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """Round float rows [B, Hkv, T, D] to numbers that a cache of this dtype can hold."""
    return restored(stored(rows, scale, dtype), scale, dtype)


def kept(rows: Tensor, like: Tensor, scale: Tensor | None, dtype: str) -> Tensor:
    """New rows as a cache keeps them: in its dtype, or in float32 as the numbers they are.

    Without a `dtype` the rows themselves.
    """
    if scale is None:
        return rows
    codes = stored(rows, scale, dtype)
    if codes.dtype == like.dtype:
        return codes
    assert like.dtype == rows.dtype, f"a cache of {dtype} is not kept as {like.dtype}"
    return restored(codes, scale, dtype)


def read(cache: Tensor, scale: Tensor | None, dtype: str) -> Tensor:
    """The float rows of a cache, whichever way it keeps them."""
    if scale is None or cache.dtype == scale.dtype:
        return cache
    return restored(cache, scale, dtype)


def numpy_stored(rows: np.ndarray, scale: np.ndarray, dtype: str) -> np.ndarray:
    """Round rows, number by number of the grid; float8 as ml_dtypes has it."""
    low, high = LIMITS[dtype]
    steps = np.minimum(np.maximum(rows / scale, low), high)
    if dtype in FLOAT8:
        return np.asarray(steps.astype(FLOAT8[dtype]))
    codes = np.rint(steps).astype(np.int64)
    if dtype == "int8":
        return np.asarray(codes.astype(np.int8))
    pairs = (codes - low).reshape(*codes.shape[:-1], -1, 2)
    return np.asarray((pairs @ np.array([1, 16])).astype(np.uint8))


def numpy_kept(
    rows: np.ndarray, like: np.ndarray, scale: np.ndarray | None, dtype: str
) -> np.ndarray:
    """New rows as a cache keeps them: as codes, or as the numbers they stand for."""
    if scale is None:
        return rows
    codes = numpy_stored(rows, scale, dtype)
    return codes if codes.dtype == like.dtype else numpy_restored(codes, scale, dtype)


def numpy_read(cache: np.ndarray, scale: np.ndarray | None, dtype: str) -> np.ndarray:
    """The rows of a cache, whichever way it keeps them."""
    if scale is None or cache.dtype in (np.float32, np.float64):
        return cache
    return numpy_restored(cache, scale, dtype)


def numpy_restored(cache: np.ndarray, scale: np.ndarray, dtype: str) -> np.ndarray:
    """The rows that a cache stands for, in float64."""
    if dtype == "int4":
        halves = np.stack(np.divmod(cache.astype(np.int64), 16)[::-1], axis=-1)
        cache = halves.reshape(*cache.shape[:-1], -1) + LIMITS[dtype][0]
    rows: np.ndarray = cache.astype(np.float64) * scale
    return rows
