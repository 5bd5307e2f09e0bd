"""Quantized projections in the fused ops of ONNX Runtime.

Weights alone, or activations rounded block by block, are `MatMulNBits`, which reads them as they
lie in memory: its accuracy level 0 multiplies float32, level 4 rounds the activations to int8.
Eight bits on both sides are `MatMulIntegerToFloat`, faster where there are many rows. What rounds a
row is made of plain ops, because `DynamicQuantizeLinear` has one scale for all rows, and then a row
changes with the rows beside it. Maps that read the same rows share the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgevlm_export.emit import Emitter
from edgevlm_export.errors import ExportError
from edgevlm_export.ops.op import MICROSOFT, attribute, static_dims, tensors
from edgevlm_export.ops.packing import blocked, lazy, once, pack_bits

CHANNEL_BLOCK = 128
"""Block of weights that have one scale a channel: repeated, and few enough of them."""

_LEAST = np.float32(1e-30)


def lower_contrib(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    """The fused kernel for a projection."""
    x_dtype, x_scales = attribute(node, "x_dtype"), attribute(node, "x_scales")
    weight = node.inputs[1]
    assert weight is not None
    if is_nbits(node):
        return [_nbits(emit, node, level=4 if x_dtype == "int8" else 0)]
    is_integer = weight.dtype == ir.DataType.INT8
    if is_integer and x_dtype == "int8" and not attribute(node, "group_size"):
        return [_integer(emit, node, x_scales)]
    assert weight.dtype is not None
    size = attribute(node, "group_size")
    groups = f" in groups of {size}" if size else ""
    activations = f"in {x_dtype} ({x_scales})" if x_dtype else "as they are"
    raise ExportError(
        f"{emit.site!r} multiplies {weight.dtype.name.lower()} weights{groups} by activations "
        f"{activations}, which no fused kernel does",
        role=emit.graph.name or "graph",
        op=node.op_type,
        hint="choose another scheme, or a target of standard ops",
    )


def is_nbits(node: ir.Node) -> bool:
    """Whether a quantized projection becomes `MatMulNBits`: floats, or floats rounded in blocks."""
    weight, x_dtype = node.inputs[1], attribute(node, "x_dtype")
    rounds_blocks = x_dtype == "int8" and attribute(node, "x_scales") == "block"
    is_integer = weight is not None and weight.dtype == ir.DataType.INT8
    return is_integer and (x_dtype in ("", "int16") or rounds_blocks)


def _nbits(emit: Emitter, node: ir.Node, level: int) -> ir.Value:
    """`MatMulNBits`: weights [N, blocks, bytes], scales [N, blocks]."""
    x, weight, scale, zero, bias = tensors(node, 5)
    assert weight is not None
    assert scale is not None
    rows, columns = static_dims(weight)
    bits = 4 if attribute(node, "bits") <= 4 else 8
    size = attribute(node, "group_size") or CHANNEL_BLOCK
    blocks = -(-columns // size)
    packed = lazy(
        emit,
        f"{weight.name}.{bits}bits",
        [weight],
        lambda values: pack_bits(blocked(values[0], size), bits),
        ir.DataType.UINT8,
        [rows, blocks, size * bits // 8],
    )
    scales = lazy(
        emit,
        f"{scale.name}.blocks",
        [scale],
        lambda values: np.broadcast_to(values[0], (rows, blocks)),
        ir.DataType.FLOAT,
        [rows, blocks],
    )
    zeros = None
    if zero is not None:
        zeros = lazy(
            emit,
            f"{zero.name}.blocks",
            [zero],
            lambda values: pack_bits(np.broadcast_to(values[0], (rows, blocks)), bits),
            ir.DataType.UINT8,
            [rows, -(-blocks * bits // 8)],
        )
    out = emit.one(
        "MatMulNBits",
        *(x, packed, scales, zeros),
        domain=MICROSOFT,
        K=columns,
        N=rows,
        bits=bits,
        block_size=size,
        accuracy_level=level,
    )
    return out if bias is None else emit.one("Add", out, bias, part="bias")


def _integer(emit: Emitter, node: ir.Node, x_scales: str) -> ir.Value:
    """Eight-bit products: unsigned activations, signed weights [K, N] with a scale per channel."""
    x, weight, scale, zero, bias, x_scale, x_zero = tensors(node, 7)
    assert x is not None
    assert weight is not None
    assert scale is not None
    rows, columns = static_dims(weight)
    transposed = lazy(
        emit,
        f"{weight.name}.T",
        [weight],
        lambda values: np.ascontiguousarray(values[0].T),
        ir.DataType.INT8,
        [columns, rows],
    )
    scales, zeros = (
        None
        if value is None
        else lazy(emit, f"{value.name}.row", [value], lambda v: v[0][:, 0], value.dtype, [rows])
        for value in (scale, zero)
    )
    if x_scales == "tensor":
        return emit.one(
            "DynamicQuantizeMatMul", *(x, transposed, scales, zeros, bias), domain=MICROSOFT
        )
    if x_scales == "static":
        rounded, step, shift = _static(emit, x, x_scale, x_zero)
        return emit.one(
            "MatMulIntegerToFloat",
            *(rounded, transposed, step, scales, shift, zeros, bias),
            domain=MICROSOFT,
        )
    rounded, steps = _rounded_rows(emit, x)
    one, shift = emit.constant(np.float32(1)), emit.constant(np.uint8(128))
    product = (rounded, transposed, one, scales, shift, zeros)
    out = emit.one("MatMulIntegerToFloat", *product, domain=MICROSOFT)
    out = emit.one("Mul", out, steps, part="scaled")
    return out if bias is None else emit.one("Add", out, bias, part="bias")


def _static(
    emit: Emitter, x: ir.Value, x_scale: ir.Value | None, x_zero: ir.Value | None
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Activations as uint8 with a constant scale, the scale, and the zero point."""
    step, zero = (value.const_value for value in (x_scale, x_zero) if value is not None)
    assert step is not None
    assert zero is not None
    scale = emit.constant(np.float32(step.numpy()))
    shift = emit.constant(np.uint8(int(zero.numpy()) + 128))

    def make() -> tuple[ir.Value, ...]:
        return (emit.one("QuantizeLinear", x, scale, shift, part="rounded"),)

    key = f"{x.name} {scale.name} {shift.name}"
    return once(emit, key, make)[0], scale, shift


def _rounded_rows(emit: Emitter, x: ir.Value) -> tuple[ir.Value, ...]:
    """Rows [.., T, K] as uint8 around 128, and the scale of each [.., T, 1]."""

    def make() -> tuple[ir.Value, ...]:
        size = emit.one("Abs", x, part="sizes")
        largest = emit.one("ReduceMax", size, emit.ints(-1), part="largest", keepdims=1)
        steps = emit.one("Mul", largest, emit.constant(np.float32(1 / 127)), part="steps")
        steps = emit.one("Max", steps, emit.constant(_LEAST), part="steps_above_zero")
        whole = emit.one("Div", x, steps, part="in_steps")
        one, shift = emit.constant(np.float32(1)), emit.constant(np.uint8(128))
        return emit.one("QuantizeLinear", whole, one, shift, part="rounded"), steps

    return once(emit, f"{x.name} rows", make)
