"""The cache that an attention reads: its dtype, and what shares a scale.

A kernel may take a quantized cache as it lies there, or other ops restore its numbers before.
Either way it is an input of the graph, and is found by walking back from what attends to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from edgevlm.audit.trace import attribute, constant, dtype_name, rounding, source
from edgevlm_export.targets.target import op_names

__all__ = ["Cache", "cache_of"]

_PAST_KEY = {"GroupQueryAttention": 3, "MultiHeadAttention": 6, "Attention": 4}
_RANK = 4  # axes of a cache: batch, head, slot, feature
_RESTORING = op_names(
    "BitShift BitwiseAnd Cast Concat DequantizeLinear Expand Identity Mul Reshape Slice Sub",
    "Transpose Unsqueeze",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """A cache that is an input of the graph."""

    dtype: str
    granularity: str = ""


def cache_of(node: ir.Node) -> Cache | None:
    """The keys, or the values, that an attention reads, or a product of computed values."""
    place = _PAST_KEY.get(node.op_type)
    if place is None:
        found = (_restored(value) for value in node.inputs)
        cache = next((cache for cache in found if cache is not None), None)
        # Rows of this call are rounded as those of the cache are.
        new = rounding(source(node, 1)) if cache is None else None
        return cache if new is None else Cache(dtype=new.dtype, granularity=new.granularity)
    cache = _restored(source(node, place))
    kind = node.attributes.get("k_quant_type")
    if cache is None or kind is None or kind.as_string() == "NONE":
        return cache
    bits = attribute(node, "kv_cache_bit_width", 8)
    granularity = "tensor" if kind.as_string() == "PER_TENSOR" else "channel"
    return Cache(dtype="int4" if bits == 4 else cache.dtype, granularity=granularity)


def _restored(value: ir.Value | None) -> Cache | None:
    """The cache whose numbers a value has, found along the ops that restore them."""
    if value is None or constant(value) is not None:
        return None
    node = value.producer()
    if node is None:
        return _input(value)
    if node.op_type not in _RESTORING:
        return None
    # Only the parts of a Concat are alike: what else an op takes says how it restores.
    parts = node.inputs if node.op_type in ("Concat", "Mul") else node.inputs[:1]
    cache = next((found for found in map(_restored, parts) if found is not None), None)
    if cache is None:
        return None
    if node.op_type == "BitwiseAnd":
        return replace(cache, dtype="int4")
    if node.op_type in ("DequantizeLinear", "Mul") and cache.dtype != "float32":
        scales = [constant(other) for other in node.inputs[:2]]
        several = any(scale is not None and scale.size > 1 for scale in scales)
        granularity = "channel" if several else cache.granularity or "tensor"
        return replace(cache, granularity=granularity)
    return cache


def _input(value: ir.Value) -> Cache | None:
    shape = value.shape
    if not value.is_graph_input() or shape is None or len(shape) != _RANK:
        return None
    return None if value.dtype is None else Cache(dtype=dtype_name(value.dtype))
