"""A projection with quantized weights: rounded(x) W^T + b, W of integers (or float8) and scales.

    W[n, k] = scale[n, g] * (weight[n, k] - zero[n, g])        g = k // group_size

What rounds x is `x_dtype`, none of it where that is empty, and `x_scales`, which says what shares a
scale: the row of a call (`token`), the whole `tensor`, a `block` of the weights' columns in a row,
or everything, by a constant (`static`). The eager form multiplies the rounded numbers in float32; a
kernel that multiplies integers gives the same up to the order of its sums.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from edgevlm_export.ops.op import Op, torch_op
from edgevlm_export.ops.quant_product import lower_contrib
from edgevlm_export.ops.quant_qdq import lower_standard

# N outputs, K inputs, G groups of K

TINY = 1e-30
"""Scales are at least this: a row of zeros divides by no zero."""

FLOAT8_MAX = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
INT_BITS = {"int8": 8, "int16": 16}


def _empty(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch_op("quant_linear", fake=_empty)
def quant_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    bits: int,
    group_size: int,
    x_dtype: str,
    x_scales: str,
) -> Tensor:
    """Map float32 [..., K] to [..., N].

    `weight` [N, K] is int8, int16 or float8, `scale` [N, G] float32, `zero` [N, G] of the weight's
    dtype (None: 0). `bits` are those of the weights, `group_size` 0 is a whole row of K. `x_scale`
    [] float32 and `x_zero` [] int32 are the constants of static activations.
    """
    rounded = _rounded(x, x_scale, x_zero, group_size, x_dtype, x_scales)
    return nn.functional.linear(rounded, dequantized(weight, scale, zero, group_size), bias)


def dequantized(weight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """Float32 [N, K]."""
    columns = weight.shape[1]
    size = group_size or columns
    values = weight.float()
    if scale.shape[1] == 1:
        return (values if zero is None else values - zero.float()) * scale
    if zero is not None:
        values = values - zero.float().repeat_interleave(size, dim=1)[:, :columns]
    return values.mul_(scale.repeat_interleave(size, dim=1)[:, :columns])


def _rounded(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    group_size: int,
    x_dtype: str,
    x_scales: str,
) -> Tensor:
    """The numbers that are multiplied."""
    if not x_dtype:
        return x
    if x_scales == "static":
        assert x_scale is not None, "static activations have a scale"
        if x_dtype in FLOAT8_MAX:
            most = FLOAT8_MAX[x_dtype]
            small = (x / x_scale).clamp(-most, most).to(getattr(torch, x_dtype))
            real: Tensor = small.float() * x_scale
            return real
        assert x_zero is not None, "static integers have a zero point"
        most = 2 ** (INT_BITS[x_dtype] - 1)
        whole = torch.clamp(torch.round(x / x_scale) + x_zero, -most, most - 1)
        steps: Tensor = (whole - x_zero) * x_scale
        return steps
    if x_scales == "tensor":
        # What DynamicQuantizeLinear does: eight bits from the least to the largest, 0 among them.
        low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
        step = ((high - low) / 255).clamp(min=TINY)
        shift = torch.round(-low / step).clamp(0, 255)
        return (torch.clamp(torch.round(x / step) + shift, 0, 255) - shift) * step
    assert x_dtype == "int8", f"no scales found in a call for {x_dtype}"
    rows = x if x_scales == "token" else _blocks(x, group_size)
    step = (rows.abs().amax(dim=-1, keepdim=True) * (1 / 127)).clamp(min=TINY)
    found = torch.round(rows / step) * step
    whole_row: Tensor = found if x_scales == "token" else found.flatten(-2)[..., : x.shape[-1]]
    return whole_row


def _blocks(x: Tensor, size: int) -> Tensor:
    """[..., K] as [..., G, size], zeros behind the end."""
    size = size or x.shape[-1]
    missing = -x.shape[-1] % size
    blocks: Tensor = nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, size))
    return blocks


def numpy_quant_linear(
    x: np.ndarray,
    weight: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    bias: np.ndarray | None,
    x_scale: np.ndarray | None,
    x_zero: np.ndarray | None,
    bits: int,
    group_size: int,
    x_dtype: str,
    x_scales: str,
) -> np.ndarray:
    """Multiply in float64, group by group; float8 weights come as the floats that they are."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    columns = weight.shape[1]
    size = group_size or columns
    out = np.zeros((len(rows), len(weight)))
    for group, start in enumerate(range(0, columns, size)):
        part = slice(start, start + size)
        shift = 0 if zero is None else zero[:, group, None].astype(np.float64)
        real = (weight[:, part].astype(np.float64) - shift) * scale[:, group, None]
        seen = rows if x_scales in ("token", "tensor") else rows[:, part]
        out += _numpy_rounded(seen, rows, part, x_scale, x_zero, x_dtype, x_scales) @ real.T
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], len(weight))


def _numpy_rounded(
    seen: np.ndarray,
    rows: np.ndarray,
    part: slice,
    x_scale: np.ndarray | None,
    x_zero: np.ndarray | None,
    x_dtype: str,
    x_scales: str,
) -> np.ndarray:
    """The columns `part` of the rows, rounded with the scales of `seen`."""
    x = rows[:, part]
    if not x_dtype:
        return x
    if x_scales == "static":
        assert x_scale is not None
        if x_dtype in FLOAT8_MAX:
            return np.asarray(numpy_float8(x / x_scale, x_dtype) * x_scale)
        assert x_zero is not None
        most = 2 ** (INT_BITS[x_dtype] - 1)
        shifted = np.clip(np.round(x / x_scale) + x_zero, -most, most - 1)
        return np.asarray((shifted - x_zero) * x_scale)
    if x_scales == "tensor":
        low, high = min(seen.min(), 0.0), max(seen.max(), 0.0)
        step = max((high - low) / 255, TINY)
        shift = np.clip(np.round(-low / step), 0, 255)
        return np.asarray((np.clip(np.round(x / step) + shift, 0, 255) - shift) * step)
    step = np.maximum(np.abs(seen).max(axis=1, keepdims=True) / 127, TINY)
    return np.asarray(np.round(x / step) * step)


def numpy_float8(x: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest float8 of each number, ties to even, by the definition of the format."""
    mantissa, least = {"float8_e4m3fn": (3, -6), "float8_e5m2": (2, -14)}[dtype]
    size = np.abs(x)
    _, exponents = np.frexp(np.where(size == 0, 1.0, size))
    step = np.exp2(np.maximum(exponents - 1, least) - mantissa)
    most = FLOAT8_MAX[dtype]
    return np.asarray(np.clip(np.round(x / step) * step, -most, most))


def num_groups(columns: int, group_size: int) -> int:
    """Groups of a row."""
    return math.ceil(columns / group_size) if group_size else 1


OP = Op(
    name="quant_linear",
    overload=torch.ops.edgevlm.quant_linear.default,
    numpy=numpy_quant_linear,
    lowerings={"contrib": lower_contrib, "standard": lower_standard},
)
