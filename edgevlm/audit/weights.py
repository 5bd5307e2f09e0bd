"""The constant weights of an op: their dtype, and what shares a scale.

Read from the file and from the graph as ONNX Runtime left it alike: a difference between the two is
a lie of one of them. What shares a scale is read from the scales themselves, not from the name of a
block: blocks of equal scales are a channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgevlm.audit.trace import (
    attribute,
    constant,
    dtype_name,
    is_unsigned,
    scales_of_blocks,
    source,
    stored,
)

__all__ = ["MICROSOFT", "NBITS", "PRODUCTS", "Operands", "Weights", "is_product", "weights_of"]

MICROSOFT = "com.microsoft"
_NCHWC = "com.microsoft.nchwc"


@dataclass(frozen=True, kw_only=True, slots=True)
class Operands:
    """Inputs of a product A B: where A, B and the scales of B are, and the axis of B's outputs."""

    a: int = 0
    b: int = 1
    scale: int | None = None
    rows: int = -1
    integer: bool = False


PRODUCTS = {
    ("", "MatMul"): Operands(),
    ("", "Gemm"): Operands(),
    (MICROSOFT, "FusedMatMul"): Operands(),
    (MICROSOFT, "FusedGemm"): Operands(),
    ("", "Conv"): Operands(rows=0),
    (MICROSOFT, "FusedConv"): Operands(rows=0),
    (_NCHWC, "Conv"): Operands(rows=0),
    ("", "MatMulInteger"): Operands(integer=True),
    (MICROSOFT, "MatMulIntegerToFloat"): Operands(integer=True, scale=3),
    (MICROSOFT, "DynamicQuantizeMatMul"): Operands(integer=True, scale=2),
    ("", "QLinearMatMul"): Operands(integer=True, b=3, scale=4),
    (MICROSOFT, "QGemm"): Operands(integer=True, b=3, scale=4),
    (MICROSOFT, "QAttention"): Operands(integer=True, scale=4),
    ("", "QLinearConv"): Operands(integer=True, b=3, scale=4, rows=0),
    (MICROSOFT, "QLinearConv"): Operands(integer=True, b=3, scale=4, rows=0),
    ("", "ConvInteger"): Operands(integer=True, rows=0),
}
"""Kernels that multiply two inputs, by domain and op type."""

NBITS = (MICROSOFT, "MatMulNBits")
_TABLES = frozenset({("", "Gather"), (MICROSOFT, "GatherBlockQuantized")})
_FAR = 4  # nodes between integer rows that are looked up and the product with their scales


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Constant weights, what shares a scale, and how many of them an output is a sum over.

    `expanded_by` names the node that makes floats of them in every call. `matrix` [.., K, N] or
    [N, ..] (`rows` is the axis of N) is there for integer kernels.
    """

    dtype: str
    granularity: str
    columns: int
    expanded_by: str = ""
    unsigned: bool = False
    matrix: ir.TensorProtocol | None = None
    rows: int = -1


def is_product(node: ir.Node) -> bool:
    """Whether a node multiplies, or looks up rows of a table: what a scheme can be asked of."""
    key = (node.domain, node.op_type)
    return key in PRODUCTS or key == NBITS or (key in _TABLES and weights_of(node) is not None)


def weights_of(node: ir.Node) -> Weights | None:
    """The constant weights that a node reads, None if it has none."""
    key = (node.domain, node.op_type)
    if key == NBITS:
        return _blocks(node)
    if key in _TABLES:
        return _table(node)
    operands = PRODUCTS.get(key)
    if operands is None:
        return None
    matrix = source(node, operands.b)
    rows = operands.rows
    if rows < 0:
        rows = _rank(matrix) - (2 if attribute(node, "transB") else 1)
    held = stored(matrix, rows)
    if held is None:
        return None
    return Weights(
        dtype=held.dtype,
        granularity=_scales_of_integers(node, operands) if operands.integer else held.granularity,
        columns=held.columns,
        expanded_by=held.expanded_by,
        unsigned=is_unsigned(held.tensor.dtype),
        matrix=held.tensor if operands.integer else None,
        rows=held.rows,
    )


def _blocks(node: ir.Node) -> Weights:
    """Weights of MatMulNBits; computed scales, which nobody writes, count as one for each block."""
    scales = constant(source(node, 2))
    block = attribute(node, "block_size")
    granularity = f"group:{block}"
    if scales is not None:
        granularity = scales_of_blocks(scales.numpy().reshape(attribute(node, "N"), -1), block)
    return Weights(
        dtype=f"int{attribute(node, 'bits', 4)}",
        granularity=granularity,
        columns=attribute(node, "K"),
    )


def _table(node: ir.Node) -> Weights | None:
    """A table whose rows are looked up; a vector, or what was computed, is none."""
    data = source(node, 0)
    if node.op_type == "GatherBlockQuantized":
        scales, tensor = constant(source(node, 2)), constant(data)
        if scales is None or tensor is None:
            return None
        block = attribute(node, "block_size", 128)
        table = scales.numpy().reshape(scales.shape.numpy()[0], -1)
        packed = tensor.dtype == ir.DataType.UINT8
        return Weights(
            dtype=f"int{attribute(node, 'bits', 4)}" if packed else dtype_name(tensor.dtype),
            granularity=scales_of_blocks(table, block),
            columns=block * table.shape[1],
        )
    held = stored(data, 0)
    if held is None or len(held.tensor.shape) < 2 or attribute(node, "axis") != 0:
        return None
    if held.tensor.dtype == ir.DataType.INT64:
        return None
    granularity = held.granularity
    if not held.expanded_by and not held.tensor.dtype.is_floating_point():
        granularity = _scales_of_rows(node.outputs[0], held.columns)
    return Weights(
        dtype=held.dtype,
        granularity=granularity,
        columns=held.columns,
        expanded_by=held.expanded_by,
    )


def _scales_of_rows(value: ir.Value, columns: int) -> str:
    """What shares a scale of integer rows that are looked up, then multiplied by theirs."""
    for _ in range(_FAR):
        users = value.consumers()
        if len(users) != 1:
            return ""
        user = users[0]
        if user.op_type in ("Mul", "DequantizeLinear"):
            scale = next((other for other in user.inputs[:2] if other is not value), None)
            lookup = None if scale is None else _lookup(scale)
            if lookup is None:
                return "tensor" if constant(scale) is not None else ""
            table = lookup.numpy().reshape(lookup.shape.numpy()[0], -1)
            return scales_of_blocks(table, max(1, columns // table.shape[1]))
        value = user.outputs[0]
    return ""


def _lookup(value: ir.Value) -> ir.TensorProtocol | None:
    """The table that the rows of a value are looked up in."""
    node = value.producer()
    while node is not None and node.op_type in ("Unsqueeze", "Reshape"):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return constant(source(node, 0)) if node is not None and node.op_type == "Gather" else None


def _scales_of_integers(node: ir.Node, operands: Operands) -> str:
    """What shares a scale of the weights of an integer kernel."""
    if operands.scale is not None:
        scale = constant(source(node, operands.scale))
    else:
        scale = _scale_behind(node.outputs[0])
    if scale is None:
        return ""
    return "tensor" if scale.size == 1 or not np.ptp(scale.numpy()) else "channel"


def _scale_behind(value: ir.Value) -> ir.TensorProtocol | None:
    """The constant that an integer product is multiplied by, alone or times another scale."""
    for user in value.consumers():
        if user.op_type == "Cast":
            return _scale_behind(user.outputs[0])
        if user.op_type == "Mul":
            factors = [factor for factor in user.inputs if factor is not value]
            makers = [factor.producer() for factor in factors if factor is not None]
            factors += [factor for maker in makers if maker is not None for factor in maker.inputs]
            found = [constant(factor) for factor in factors]
            return next((tensor for tensor in found if tensor is not None), None)
    return None


def _rank(value: ir.Value | None) -> int:
    """Axes of a value; where the file does not say, products are of matrices."""
    tensor = constant(value)
    if tensor is not None:
        return len(tensor.shape)
    return 2 if value is None or value.shape is None else len(value.shape)
