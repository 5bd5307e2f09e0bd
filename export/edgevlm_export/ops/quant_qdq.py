"""Quantized projections in standard ops: products of what DequantizeLinear gives.

The weights [K, N] are stored as integers or float8 and dequantized per channel, or per block of K
(opset 21). Activations have constant scales: an NPU finds none as it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgevlm_export.emit import Emitter
from edgevlm_export.errors import ExportError
from edgevlm_export.ops.op import DOMAIN, attribute, static_dims, tensors
from edgevlm_export.ops.packing import lazy, once

_FLOAT8 = {
    "float8_e4m3fn": (ir.DataType.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
    "float8_e5m2": (ir.DataType.FLOAT8E5M2, ml_dtypes.float8_e5m2),
}
_INT = {"int8": np.int8, "int16": np.int16}


def lower_standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    """DequantizeLinear of the weights, MatMul, Add, behind rounded activations."""
    x, weight, scale, zero, bias, x_scale, x_zero = tensors(node, 7)
    assert x is not None
    assert weight is not None
    assert scale is not None
    x_dtype, x_scales = attribute(node, "x_dtype"), attribute(node, "x_scales")
    if x_dtype:
        if x_scales != "static":
            raise ExportError(
                f"{emit.site!r} finds the scales of its activations as it runs ({x_scales})",
                role=emit.graph.name or "graph",
                op=node.op_type,
                hint="choose activations: static for a target of standard ops",
            )
        x = rounded(emit, x, x_scale, x_zero, x_dtype)
    real = _weights(emit, node, weight, scale, zero)
    out = emit.one("MatMul", x, real)
    return [out if bias is None else emit.one("Add", out, bias, part="bias")]


def needed_opset(graph: ir.Graph) -> int:
    """The opset that the quantized projections of a graph need in this form; 0 without any.

    QuantizeLinear and DequantizeLinear know float8 and channels from opset 19 on, int16, int4 and
    blocks from 21 on.
    """
    needed = 0
    for node in graph:
        if (node.domain, node.op_type) != (DOMAIN, "quant_linear"):
            continue
        weight = node.inputs[1]
        assert weight is not None
        is_new = (
            attribute(node, "group_size")
            or attribute(node, "bits") <= 4
            or weight.dtype == ir.DataType.INT16
            or attribute(node, "x_dtype") == "int16"
        )
        needed = max(needed, 21 if is_new else 19)
    return needed


def rounded(
    emit: Emitter, x: ir.Value, x_scale: ir.Value | None, x_zero: ir.Value | None, dtype: str
) -> ir.Value:
    """A pair of QuantizeLinear and DequantizeLinear with a constant scale."""
    assert x_scale is not None
    assert x_scale.const_value is not None
    scale = emit.constant(np.float32(x_scale.const_value.numpy()))
    if dtype in _FLOAT8:
        kind, numpy_dtype = _FLOAT8[dtype]
        name = f"plumbing/{dtype}(0)"
        shift = emit.initializer(
            name, lambda: ir.Tensor(np.zeros((), numpy_dtype), dtype=kind, name=name)
        )
    else:
        assert x_zero is not None
        assert x_zero.const_value is not None
        shift = emit.constant(_INT[dtype](int(x_zero.const_value.numpy())))

    def make() -> tuple[ir.Value, ...]:
        small = emit.one("QuantizeLinear", x, scale, shift, part="quantize")
        return (emit.one("DequantizeLinear", small, scale, shift, part="dequantize"),)

    return once(emit, f"{x.name} {scale.name} {shift.name}", make)[0]


def _weights(
    emit: Emitter, node: ir.Node, weight: ir.Value, scale: ir.Value, zero: ir.Value | None
) -> ir.Value:
    """The weights [K, N], dequantized."""
    rows, columns = static_dims(weight)
    size = attribute(node, "group_size")
    is_narrow = weight.dtype == ir.DataType.INT8 and attribute(node, "bits") <= 4
    kind = ir.DataType.INT4 if is_narrow else weight.dtype
    suffix = "4bits.T" if is_narrow else "T"

    def stored(value: ir.Value, shape: Sequence[int]) -> ir.Value:
        def make(values: list[np.ndarray]) -> np.ndarray:
            flipped = values[0].T.reshape(shape)
            return np.asarray(flipped.astype(ml_dtypes.int4) if is_narrow else flipped)

        return lazy(emit, f"{value.name}.{suffix}", [value], make, kind, shape)

    groups = -(-columns // size) if size else 1
    shape = [groups, rows] if size else [rows]
    steps = lazy(
        emit, f"{scale.name}.T", [scale], lambda v: v[0].T.reshape(shape), scale.dtype, shape
    )
    shifts = None if zero is None else stored(zero, shape)
    options = {"axis": 0, "block_size": size} if size else {"axis": 1}
    return emit.one(
        "DequantizeLinear",
        *(stored(weight, [columns, rows]), steps, shifts),
        part="weights",
        **options,
    )
