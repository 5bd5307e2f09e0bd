"""Integers and scales in the place of a weight matrix, and the layouts that engines store.

    weight[n, k] ~ scale[n, g] * (values[n, k] - zero[n, g]),    g = k // group_size

Integers are kept in the signed domain of their bits, as ONNX has them (-8 to 7 for 4 bits); a
layout of unsigned integers adds half the range to values and zeros alike. Zero is always a number
of the grid, so padding is exact. A scale may be negative: its group then has the longer side of the
range at the positive end.
"""

# N outputs, K inputs, G groups of K, B blocks of K

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

MAX_BITS = 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantTensor:
    """A weight matrix of integers.

    `values` [N, K] and `zero` [N, G] are int8 up to 8 bits, else int16; `scale` [N, G] is float32.
    `group_size` columns share a scale, 0 means the whole row; the last group may be short. Without
    `zero` the grid is symmetric.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """The weights [N, K] that these integers mean, float32."""
        weight_NK = self.values.float()
        for columns, groups, width in group_spans(self.values.shape[1], self.group_size):
            part_NGW = weight_NK[:, columns].unflatten(1, (-1, width))
            if self.zero is not None:
                part_NGW -= self.zero[:, groups, None]
            part_NGW *= self.scale[:, groups, None]
        return weight_NK


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Float8Tensor:
    """A matrix of float8 `values` [N, K] and float32 `scale`, [N, 1] or [1, 1]."""

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """The weights [N, K] that these numbers mean, float32."""
        return self.values.float() * self.scale


def integer_range(bits: int, narrow: bool = False) -> tuple[int, int]:
    """The smallest and the largest integer of a signed domain; `narrow` leaves out the smallest.

    Seven bits keep int8 weights where pairs of products with uint8 fit into int16, which a
    processor without VNNI adds with saturation.
    """
    if not 2 <= bits <= MAX_BITS:
        raise ValueError(f"{bits} bits are not within 2 to {MAX_BITS}")
    most = 1 << (bits - 1)
    return (1 - most if narrow else -most), most - 1


def storage_dtype(bits: int) -> torch.dtype:
    """The torch dtype that holds integers of so many bits."""
    return torch.int8 if bits <= 8 else torch.int16


def group_spans(columns: int, group_size: int) -> Iterator[tuple[slice, slice, int]]:
    """Spans of equal groups: columns, groups and the width of a group; at most two.

    The second, where there is one, is the short last group.
    """
    size = group_size or columns
    num_full = columns // size
    if num_full:
        yield slice(0, num_full * size), slice(0, num_full), size
    if columns % size:
        yield slice(num_full * size, columns), slice(num_full, num_full + 1), columns % size


def quantize(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group_size: int,
    narrow: bool = False,
) -> QuantTensor:
    """Round [N, K] to the grid of `scale` and `zero` [N, G], half to even, and clamp."""
    low, high = integer_range(bits, narrow)
    values_NK = torch.empty(weight.shape, dtype=storage_dtype(bits), device=weight.device)
    for columns, groups, width in group_spans(weight.shape[1], group_size):
        part_NGW = weight[:, columns].unflatten(1, (-1, width)) / scale[:, groups, None]
        part_NGW.round_()
        if zero is not None:
            part_NGW += zero[:, groups, None]
        values_NK[:, columns] = part_NGW.clamp_(low, high).flatten(1).to(values_NK.dtype)
    return QuantTensor(values=values_NK, scale=scale, zero=zero, bits=bits, group_size=group_size)


def float8_scales(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """A scale for every row [N, 1] that takes its largest number to the largest of the format."""
    most = weight.float().abs().amax(dim=1, keepdim=True)
    return positive(most / torch.finfo(dtype).max)


def to_float8(
    weight: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float8_e4m3fn
) -> Float8Tensor:
    """Round [N, K] / `scale` to float8, half to even; what is too large becomes the largest."""
    most = torch.finfo(dtype).max
    values = (weight.float() / scale).clamp_(-most, most).to(dtype)
    return Float8Tensor(values=values, scale=scale)


def positive(scale: Tensor) -> Tensor:
    """The scale, and 1 in the place of zero and of what is too small to divide by."""
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def pack_nbits(tensor: QuantTensor, block_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lay out as `com.microsoft::MatMulNBits` reads it, in 2, 4 or 8 bits.

    Returns the integers uint8 [N, B, block_size * bits / 8], scales float32 [N, B] and zero points
    uint8 [N, ceil(B * bits / 8)], or None where the kernel's default of half the range is right.
    The low bits of a byte come first. A group may span many blocks, which then repeat its scale; a
    short last block is filled up with its zero point.
    """
    if tensor.bits > 8:
        raise ValueError(f"MatMulNBits has at most 8 bits, not {tensor.bits}")
    if tensor.group_size % block_size:
        raise ValueError(f"blocks of {block_size} do not divide groups of {tensor.group_size}")
    bits = container_bits(tensor.bits)
    offset = 1 << (bits - 1)
    num_rows, num_columns = tensor.values.shape
    num_blocks = -(-num_columns // block_size)
    starts_B = torch.arange(num_blocks, device=tensor.values.device) * block_size
    group_B = starts_B // (tensor.group_size or num_columns)
    codes_NK = tensor.values.new_full(
        (num_rows, num_blocks * block_size), offset, dtype=torch.int16
    )
    zeros_NB = None
    if tensor.zero is not None:
        zeros_NB = tensor.zero[:, group_B].short() + offset
        codes_NK.unflatten(1, (num_blocks, block_size))[:] = zeros_NB[..., None]
    codes_NK[:, :num_columns] = tensor.values.short() + offset
    packed = _pack(codes_NK, bits).unflatten(1, (num_blocks, -1))
    return packed, tensor.scale[:, group_B], None if zeros_NB is None else _pack(zeros_NB, bits)


def unpack_nbits(
    packed: Tensor, scales: Tensor, zero_points: Tensor | None, *, bits: int, columns: int
) -> QuantTensor:
    """Read the layout of `pack_nbits` back, one group for every block."""
    offset = 1 << (bits - 1)
    num_blocks = packed.shape[1]
    values_NK = (_unpack(packed.flatten(1), bits) - offset)[:, :columns]
    zero = None
    if zero_points is not None:
        zero = (_unpack(zero_points, bits) - offset)[:, :num_blocks].to(torch.int8)
    return QuantTensor(
        values=values_NK.to(torch.int8),
        scale=scales,
        zero=zero,
        bits=bits,
        group_size=packed.shape[2] * 8 // bits,
    )


def container_bits(bits: int) -> int:
    """The bits of the smallest integer of `MatMulNBits` that holds so many."""
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def onnx_array(integers: Tensor, *, bits: int, unsigned: bool = False) -> np.ndarray:
    """Values or zeros as an array whose dtype is the tensor type of ONNX: (u)int4, 8 or 16.

    `onnx_ir.Tensor` packs arrays of four bits as it writes them.
    """
    kinds = (
        (ml_dtypes.uint4, np.uint8, np.uint16) if unsigned else (ml_dtypes.int4, np.int8, np.int16)
    )
    width = 4 if bits <= 4 else 8 if bits <= 8 else 16
    offset = 1 << (width - 1) if unsigned else 0
    return (integers.cpu().numpy().astype(np.int32) + offset).astype(kinds[width // 8])


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers [N, X] of 0 to 2^bits - 1 into bytes, the low bits first; the end is zero."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte))
    shifts = torch.arange(0, 8, bits, dtype=codes.dtype, device=codes.device)
    packed: Tensor = (padded.unflatten(1, (-1, per_byte)) << shifts).sum(dim=2)
    return packed.to(torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Integers [N, X] of 0 to 2^bits - 1 from bytes, int16."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int16, device=packed.device)
    codes: Tensor = (packed.short()[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1)
