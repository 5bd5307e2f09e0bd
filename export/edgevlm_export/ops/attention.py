"""Stateless attention: every key is a row of this call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.grouped import Groups
from edgevlm_export.ops.heads import (
    CLOSED,
    causal_mask,
    from_heads,
    numpy_attend,
    numpy_causal_mask,
    numpy_from_heads,
    numpy_to_heads,
    numpy_unpack,
    split_packed,
    to_heads,
    unpack,
)
from edgevlm_export.ops.op import MICROSOFT, Op, attribute, static_dims, tensors, torch_op


def _empty(
    q: Tensor, k: Tensor | None, _v: object, heads: int, kv_heads: int, *_: object
) -> Tensor:
    width = q.shape[2] if k is not None else q.shape[2] // (heads + 2 * kv_heads) * heads
    return q.new_empty(q.shape[0], q.shape[1], width)


@torch_op("attention", fake=_empty)
def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attend from q [B, T, Hq*D] to k, v [B, S, Hkv*D]; without k and v, q is packed q|k|v.

    `mask` is additive, [B or 1, Hq or 1, T, S]. `causal` lets the last row see every key.
    """
    q, k, v = unpack(q, k, v, num_heads, num_kv_heads)
    if causal:
        closed = causal_mask(q.shape[1], k.shape[1]).to(q.dtype)
        mask = closed if mask is None else mask + closed
    out = torch.nn.functional.scaled_dot_product_attention(
        to_heads(q, num_heads),
        to_heads(k, num_kv_heads),
        to_heads(v, num_kv_heads),
        attn_mask=mask,
        scale=scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    return from_heads(out)


def numpy_attention(
    q: np.ndarray,
    k: np.ndarray | None,
    v: np.ndarray | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    mask: np.ndarray | None = None,
    causal: bool = False,
) -> np.ndarray:
    """Attend as the definition says."""
    q, k, v = numpy_unpack(q, k, v, num_heads, num_kv_heads)
    total = np.zeros((1, 1, 1, 1)) if mask is None else mask
    if causal:
        total = total + numpy_causal_mask(q.shape[1], k.shape[1])
    query = numpy_to_heads(q, num_heads)
    key, value = (numpy_to_heads(x, num_kv_heads) for x in (k, v))
    return numpy_from_heads(numpy_attend(query, key, value, total, scale))


def _contrib(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    num_heads = attribute(node, "num_heads")
    if num_heads != attribute(node, "num_kv_heads"):
        return _standard(emit, node)  # MultiHeadAttention has no key-value groups
    q, k, v = _unpacked(emit, node)
    return [
        emit.one(
            "MultiHeadAttention",
            q,
            k,
            v,
            None,
            None,
            tensors(node, 4)[3],
            domain=MICROSOFT,
            num_heads=num_heads,
            scale=attribute(node, "scale"),
            unidirectional=int(attribute(node, "causal")),
        )
    ]


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    packed, k, _, mask = tensors(node, 4)
    assert packed is not None
    num_heads, num_kv_heads = attribute(node, "num_heads"), attribute(node, "num_kv_heads")
    batch, rows, width = static_dims(packed)
    keys = rows if k is None else static_dims(k)[1]
    size = width // (num_heads + 2 * num_kv_heads if k is None else num_heads)
    groups = Groups(
        batch=batch, rows=rows, num_heads=num_heads, num_kv_heads=num_kv_heads, size=size
    )
    q, k, v = _unpacked(emit, node)

    def heads(x: ir.Value, count: int, length: int, order: list[int], part: str) -> ir.Value:
        apart = emit.one("Reshape", x, emit.ints(batch, length, count, size), part=f"{part}_heads")
        return emit.one("Transpose", apart, part=part, perm=order)

    query = heads(q, num_heads, rows, [0, 2, 1, 3], "query")
    key = heads(k, num_kv_heads, keys, [0, 2, 3, 1], "key")
    value = heads(v, num_kv_heads, keys, [0, 2, 1, 3], "value")
    query = groups.heads(emit, query, emit.scalar(attribute(node, "scale"), packed))
    scores = emit.one("MatMul", query, key, part="scores")
    if attribute(node, "causal"):
        closed = numpy_causal_mask(rows, keys, closed=CLOSED)
        causal = emit.constant(np.tile(closed, (groups.count, 1)))
        scores = emit.one("Add", scores, causal, part="masked")
    if mask is not None:
        scores = emit.one("Add", scores, groups.mask(emit, mask), part="masked")
    out = emit.one("MatMul", emit.one("Softmax", scores, axis=-1), value, part="values")
    return [groups.rows_of(emit, out)]


def _unpacked(emit: Emitter, node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """q, k and v, split where they are packed."""
    q, k, v = tensors(node, 3)
    assert q is not None
    if k is not None and v is not None:
        return q, k, v
    return split_packed(emit, q, attribute(node, "num_heads"), attribute(node, "num_kv_heads"))


OP = Op(
    name="attention",
    overload=torch.ops.edgevlm.attention.default,
    numpy=numpy_attention,
    lowerings={"contrib": _contrib, "standard": _standard},
)
