"""Integers as graphs store them, made while a graph is written: packed bits, blocks, layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgevlm_export.emit import Emitter

Array = np.ndarray  # any dtype

_ROUNDED = "edgevlm.rounded"  # key of graph.meta: rounded inputs by what they were rounded with


def lazy(
    emit: Emitter,
    name: str,
    values: Sequence[ir.Value],
    make: Callable[[list[Array]], Array],
    dtype: ir.DataType | None,
    shape: Sequence[int],
) -> ir.Value:
    """The initializer of that name, computed from others when it is written."""
    constants = [value.const_value for value in values]
    assert dtype is not None

    def tensor() -> ir.TensorProtocol:
        arrays = []
        for value, constant in zip(values, constants, strict=True):
            assert constant is not None, f"{value.name} is not a constant"
            arrays.append(constant.numpy())
        return ir.Tensor(np.ascontiguousarray(make(arrays)), dtype=dtype, name=name)

    return emit.initializer(
        name, lambda: ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name)
    )


def once(emit: Emitter, key: str, make: Callable[[], tuple[ir.Value, ...]]) -> tuple[ir.Value, ...]:
    """What the first call with this key made of the graph: maps that read one input round it once.

    Nodes of the first are before those of the others, because graphs are lowered in their order.
    """
    known: dict[str, tuple[ir.Value, ...]] = emit.graph.meta.setdefault(_ROUNDED, {})
    if key not in known:
        known[key] = make()
    return known[key]


def blocked(values: Array, size: int) -> Array:
    """[N, K] as [N, blocks, size]; what is missing of the last block is zero."""
    rows, columns = values.shape
    missing = -columns % size
    return np.pad(values, ((0, 0), (0, missing))).reshape(rows, -1, size)


def pack_bits(values: Array, bits: int) -> Array:
    """Signed integers as unsigned bytes along the last axis, the low bits first.

    What was 0 is 2^(bits - 1), the zero point that `MatMulNBits` has where it is given none.
    """
    moved = (values.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 8:
        return moved
    if moved.shape[-1] % 2:
        pad = [(0, 0)] * (moved.ndim - 1) + [(0, 1)]
        moved = np.pad(moved, pad)
    return np.asarray(moved[..., 0::2] | (moved[..., 1::2] << 4))
