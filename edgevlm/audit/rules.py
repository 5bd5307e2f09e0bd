"""What the kernels of ONNX Runtime make of their operands: a rule for each family of kernels.

    product        float kernels multiply what they are given, rounded before or not; integer
                   kernels multiply eight bits by eight, and one kind of them may saturate
    MatMulNBits    weights of N bits; what it rounds A to is measured, its level is only a wish
    attention      products of computed values, over a cache that may be quantized
    table          rows that are looked up
    others         float, unless the input was rounded, or the kernel is one of integers (QLinear..)

The rules read a graph as ONNX Runtime left it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgevlm.audit.cache import cache_of
from edgevlm.audit.precision import Precision
from edgevlm.audit.probe import Kernels
from edgevlm.audit.trace import (
    Rounding,
    attribute,
    dtype_name,
    is_unsigned,
    quantizer,
    rounding,
    source,
)
from edgevlm.audit.weights import NBITS, PRODUCTS, Operands, Weights, weights_of
from edgevlm_export.targets.target import op_names

__all__ = ["Realised", "realise"]

_MOVES = op_names(
    "Cast Concat Constant ConstantOfShape DequantizeLinear DynamicQuantizeLinear Expand Flatten",
    "Gather GatherElements GatherND Identity Pad QuantizeLinear Range Reshape ScatterElements",
    "ScatterND Shape Size Slice Split Squeeze Tile Transpose Unsqueeze",
)
_ATTENTIONS = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"})
_MOST_UP, _MOST_DOWN = 32767 // 255, -(32768 // 255)  # sums of two weights times 255 in 16 bits
_AT_ONCE = 4096  # outputs whose weights are looked at together
_INT8_LEVEL = 4  # accuracy level that asks MatMulNBits for activations of int8


@dataclass(frozen=True, kw_only=True, slots=True)
class Realised:
    """What a kernel reads and multiplies, what it multiplies in, and what may go wrong with it."""

    precision: Precision
    kernel: str
    computes_in: str = "float32"
    weights: Weights | None = None
    hazard: str = ""


def realise(node: ir.Node, kernels: Kernels) -> Realised | None:
    """What an op of a loaded graph computes with; None for one that only moves numbers."""
    key = (node.domain, node.op_type)
    if key == NBITS:
        return _nbits(node, kernels)
    if key in PRODUCTS:
        operands = PRODUCTS[key]
        return _integers(node, operands, kernels) if operands.integer else _floats(node, operands)
    if node.op_type in _ATTENTIONS:
        return _attention(node)
    weights = weights_of(node)
    if weights is not None:
        precision = Precision(weights=weights.dtype, weight_granularity=weights.granularity)
        return Realised(precision=precision, kernel=node.op_type, weights=weights)
    if node.op_type in _MOVES:
        return None
    if node.op_type.startswith("QLinear"):
        precision = Precision(activations="int8", activation_granularity="tensor")
        return Realised(precision=precision, kernel=node.op_type, computes_in="int8")
    found = [rounded for rounded in map(rounding, node.inputs) if rounded is not None]
    return Realised(precision=_of(None, found[0] if found else None), kernel=node.op_type)


def _nbits(node: ir.Node, kernels: Kernels) -> Realised:
    weights, found = weights_of(node), rounding(node.inputs[0])
    bits, block = attribute(node, "bits", 4), attribute(node, "block_size")
    level = attribute(node, "accuracy_level")
    zero = source(node, 3)
    zeros = "" if zero is None else dtype_name(zero.dtype)
    shared = kernels.nbits_rounding(bits=bits, block=block, level=level, zeros=zeros)
    if shared:
        found = Rounding(dtype="int8", granularity=shared, dynamic=True, unsigned=False)
    kernel = f"MatMulNBits {bits}-bit block {block} level {level}"
    if level == _INT8_LEVEL and not shared:
        kernel += " (no kernel here, level 0 ran)"
    return Realised(
        precision=_of(weights, found),
        kernel=kernel,
        computes_in="int8" if shared else "float32",
        weights=weights,
    )


def _floats(node: ir.Node, operands: Operands) -> Realised:
    weights, found = weights_of(node), rounding(source(node, operands.a))
    precision = _of(weights, found)
    if weights is None:
        precision = _with_cache(precision, node)
    return Realised(precision=precision, kernel=node.op_type, weights=weights)


def _integers(node: ir.Node, operands: Operands, kernels: Kernels) -> Realised:
    weights = weights_of(node)
    a, b = source(node, operands.a), source(node, operands.b)
    found = quantizer(a)
    if found is None:
        # Either the kernel rounds A by itself, or A comes as integers from outside the graph.
        dynamic = node.op_type == "DynamicQuantizeMatMul"
        signed = not dynamic and a is not None and not is_unsigned(a.dtype)
        found = Rounding(dtype="int8", granularity="tensor", dynamic=dynamic, unsigned=not signed)
    unsigned = weights.unsigned if weights is not None else b is not None and is_unsigned(b.dtype)
    kernel = f"{node.op_type} {_letter(found.unsigned)} x {_letter(unsigned)}"
    saturates = found.unsigned and not unsigned and kernels.saturates()
    return Realised(
        precision=_of(weights, found),
        kernel=kernel,
        computes_in="int8",
        weights=weights,
        hazard=_saturating(weights) if saturates else "",
    )


def _attention(node: ir.Node) -> Realised:
    """Float products of computed values, in one kernel."""
    return Realised(precision=_with_cache(_of(None, None), node), kernel=node.op_type)


def _with_cache(precision: Precision, node: ir.Node) -> Precision:
    cache = cache_of(node)
    if cache is None:
        return precision
    return replace(precision, state=cache.dtype, state_granularity=cache.granularity)


def _saturating(weights: Weights | None) -> str:
    """Neighbours in a sum whose products with 255 do not fit into 16 bits together.

    Without VNNI an x86 processor adds the products of two neighbours in 16 bits, and cuts off.
    """
    if weights is None or weights.matrix is None:
        return "u8 x s8 saturates on this processor, and both sides are computed"
    table = weights.matrix.numpy()
    if weights.rows == 0:
        table = table.reshape(len(table), -1).T
    even = table.shape[-2] // 2 * 2
    first, second = (table[..., start:even:2, :] for start in (0, 1))
    count = 0
    for start in range(0, table.shape[-1], _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        pair = [half[..., part].astype(np.int16) for half in (first, second)]
        up = sum(np.maximum(half, 0) for half in pair)
        down = sum(np.minimum(half, 0) for half in pair)
        count += int(np.count_nonzero((up > _MOST_UP) | (down < _MOST_DOWN)))
    if not count:
        return ""
    return (
        f"u8 x s8 saturates on this processor: {count:,} of {first.size:,} pairs of weights "
        "can pass 16 bits"
    )


def _of(weights: Weights | None, found: Rounding | None) -> Precision:
    return Precision(
        weights="" if weights is None else weights.dtype,
        weight_granularity="" if weights is None else weights.granularity,
        activations="float32" if found is None else found.dtype,
        activation_granularity="" if found is None else found.granularity,
        dynamic=found is not None and found.dynamic,
    )


def _letter(unsigned: bool) -> str:
    return "u8" if unsigned else "s8"
