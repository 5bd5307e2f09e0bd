"""Traces: what a value of a graph was rounded to, found by walking back to where it was made.

Nothing here goes by names. Activations are traced to the QuantizeLinear that rounds them and to the
reduction that finds its scale; weights to the constant that holds them, and to its scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgevlm_export.targets.target import op_names

__all__ = [
    "Rounding",
    "Stored",
    "attribute",
    "constant",
    "dtype_name",
    "is_unsigned",
    "quantizer",
    "rounding",
    "scales_of_blocks",
    "source",
    "stored",
]

_NAMES = {
    "FLOAT": "float32",
    "UINT16": "int16",
    "UINT8": "int8",
    "UINT4": "int4",
    "UINT2": "int2",
    "FLOAT8E4M3FN": "float8_e4m3fn",
    "FLOAT8E5M2": "float8_e5m2",
}
_UNSIGNED = frozenset({ir.DataType.UINT16, ir.DataType.UINT8, ir.DataType.UINT4})
_MOVES = op_names("Flatten Identity Reshape Slice Split Squeeze Transpose Unsqueeze")
_SIZES = op_names("Abs Cast Neg")
_SCALING = _SIZES | op_names("Add Clip Div Max Min Mul Reciprocal Sub Where")
_REDUCTIONS = op_names("ReduceMax ReduceMin ReduceL1 ReduceL2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """What rounds activations: dtype, what shares a scale, whether that is found in every call."""

    dtype: str
    granularity: str
    dynamic: bool
    unsigned: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """The constant that holds weights, what shares a scale, and the node that makes them float.

    `rows` is the axis of the constant along which the outputs of a product lie.
    """

    dtype: str
    granularity: str
    tensor: ir.TensorProtocol
    rows: int
    expanded_by: str = ""

    @property
    def columns(self) -> int:
        """How many weights an output is a sum over."""
        shape = self.tensor.shape.numpy()
        if self.rows == 0:
            return math.prod(shape[1:])
        return shape[self.rows - 1]


def dtype_name(dtype: ir.DataType | None) -> str:
    """The name of a dtype here: signed and unsigned integers are as fine as each other."""
    assert dtype is not None, "every constant of a graph has a type"
    return _NAMES.get(dtype.name, dtype.name.lower())


def is_unsigned(dtype: ir.DataType | None) -> bool:
    """Whether a dtype is an unsigned integer."""
    return dtype in _UNSIGNED


def attribute(node: ir.Node, name: str, default: int = 0) -> int:
    """A whole number that a node is given."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def source(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, None where it has none there."""
    return node.inputs[index] if index < len(node.inputs) else None


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a value that no call can change."""
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor()
    return value.const_value if value.is_initializer() else None


def rounding(value: ir.Value | None) -> Rounding | None:
    """What the float activations of a product were rounded to before it, None if by nothing."""
    node = _maker(value)
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        return quantizer(node.inputs[0])
    if node.op_type == "Mul":
        # A row is divided by its scale, rounded with scale 1, and multiplied by the scale again.
        for rounded, scale in (node.inputs, node.inputs[::-1]):
            inner = _maker(rounded)
            if inner is not None and inner.op_type == "DequantizeLinear":
                quantize = _maker(inner.inputs[0])
                divide = None if quantize is None else _maker(quantize.inputs[0])
                if divide is not None and scale in divide.inputs:
                    return quantizer(inner.inputs[0])
    return None


def quantizer(value: ir.Value | None) -> Rounding | None:
    """What makes quantized activations, None if nothing in the graph does."""
    node = _maker(value)
    if node is None:
        return None
    if node.op_type == "DynamicQuantizeLinear":
        return Rounding(dtype="int8", granularity="tensor", dynamic=True, unsigned=True)
    if node.op_type != "QuantizeLinear":
        return None
    dtype = _quantized_dtype(node)
    granularity, dynamic = _scale_of(node)
    return Rounding(
        dtype=dtype_name(dtype),
        granularity=granularity,
        dynamic=dynamic,
        unsigned=is_unsigned(dtype),
    )


def stored(value: ir.Value | None, rows: int) -> Stored | None:
    """The constant behind weights, None if they are computed; their outputs lie along `rows`."""
    tensor = constant(value)
    if tensor is not None:
        return Stored(dtype=dtype_name(tensor.dtype), granularity="", tensor=tensor, rows=rows)
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        held = stored(node.inputs[0], rows)
        if held is None:
            return None
        return replace(held, granularity=_weight_scales(node, held), expanded_by=str(node.name))
    if node.op_type == "Transpose":
        order = node.attributes.get("perm")
        flipped = (1, 0) if order is None else tuple(order.as_ints())
        return stored(node.inputs[0], flipped[rows])
    if node.op_type in _MOVES or node.op_type == "Cast":
        return stored(node.inputs[0], rows)
    return None


def scales_of_blocks(table: np.ndarray, block: int) -> str:
    """What shares a scale in weights that have one for each block of a row: [rows, blocks].

    A channel is blocks of equal scales, and a tensor is channels of equal scales.
    """
    if len(table) > 1 and (table == table.flat[0]).all():
        return "tensor"
    return "channel" if (table == table[:, :1]).all() else f"group:{block}"


def _maker(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value, behind those that only move numbers."""
    value = _unmoved(value)
    return None if value is None else value.producer()


def _unmoved(value: ir.Value | None) -> ir.Value | None:
    """The value that others only move the numbers of."""
    while value is not None:
        node = value.producer()
        if node is None or node.op_type not in _MOVES:
            return value
        value = node.inputs[0]
    return value


def _quantized_dtype(node: ir.Node) -> ir.DataType:
    """The dtype that a QuantizeLinear gives: its zero point's, the attribute's, or uint8."""
    zero = constant(source(node, 2))
    if zero is not None:
        return zero.dtype
    given = attribute(node, "output_dtype")
    return ir.DataType(given) if given else ir.DataType.UINT8


def _scale_of(node: ir.Node) -> tuple[str, bool]:
    """What shares a scale of a QuantizeLinear, and whether the scale is found in every call."""
    rounded, scale = node.inputs[0], node.inputs[1]
    tensor = constant(scale)
    if tensor is None:
        return _reduced(scale, rounded) or "tensor", True
    # With a constant scale, usually 1, rows may have been divided by scales of their own before.
    divide = _maker(rounded)
    if divide is not None and divide.op_type in ("Div", "Mul"):
        for whole, step in (divide.inputs, divide.inputs[::-1]):
            found = _reduced(step, whole)
            if found is not None:
                return found, True
    block = attribute(node, "block_size")
    if block:
        return f"group:{block}", False
    return ("tensor" if tensor.size == 1 else "channel"), False


def _reduced(scale: ir.Value | None, rounded: ir.Value | None) -> str | None:
    """What of `rounded` a scale is found from, `token` for a row; None if it is not found there."""
    waiting: list[ir.Value | None] = [scale]
    seen: set[ir.Node] = set()
    while waiting:
        value = waiting.pop()
        node = None if value is rounded else _maker(value)
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in _REDUCTIONS and _is_size_of(node.inputs[0], rounded):
            return _reduced_axes(node)
        if node.op_type in _SCALING:
            waiting += node.inputs
    return None


def _is_size_of(value: ir.Value | None, rounded: ir.Value | None) -> bool:
    """Whether a value is another, or the absolute values of it."""
    whole = _unmoved(rounded)
    while True:
        value = _unmoved(value)
        node = None if value is None or value is whole else value.producer()
        if node is None or node.op_type not in _SIZES:
            return value is whole
        value = node.inputs[0]


def _reduced_axes(node: ir.Node) -> str:
    """`token` where the last axis alone is reduced; without shapes only -1 is known to be it."""
    axes = constant(source(node, 1))
    given = node.attributes.get("axes")
    if axes is not None:
        found = axes.numpy().reshape(-1).tolist()
    else:
        found = [] if given is None else list(given.as_ints())
    value = node.inputs[0]
    while value is not None and value.shape is None:
        maker = value.producer()
        value = maker.inputs[0] if maker is not None and maker.op_type in _SIZES else None
    last = [-1] if value is None or value.shape is None else [-1, len(value.shape) - 1]
    return "token" if len(found) == 1 and found[0] in last else "tensor"


def _weight_scales(node: ir.Node, held: Stored) -> str:
    """What shares a scale of a DequantizeLinear of weights."""
    scale = constant(node.inputs[1])
    if scale is None:
        return ""
    if scale.size == 1:
        return "tensor"
    axis = attribute(node, "axis", 1) % len(held.tensor.shape)
    block = attribute(node, "block_size")
    if not block:
        return "channel" if axis == held.rows else "input"
    if axis == held.rows:
        return "input"
    rows_first = np.moveaxis(scale.numpy(), held.rows, 0)
    return scales_of_blocks(rows_first.reshape(len(rows_first), -1), block)
