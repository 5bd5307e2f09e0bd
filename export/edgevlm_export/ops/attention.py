"""Stateless attention: every key is a row of this call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import PLUMBING, Emitter
from edgevlm_export.ops.heads import (
    from_heads,
    numpy_from_heads,
    numpy_softmax,
    numpy_to_heads,
    numpy_unpack,
    split_packed,
    to_heads,
    unpack,
)
from edgevlm_export.ops.op import MICROSOFT, Op, attribute, static_dims, tensors

MASKED = -60000.0  # closes a score, and is finite in float16


@torch.library.custom_op("edgevlm::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    q, k, v = unpack(q, k, v, num_heads, num_kv_heads)
    rows, keys = q.shape[1], k.shape[1]
    if causal:
        allowed = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        closed = torch.zeros(rows, keys, dtype=q.dtype).masked_fill(~allowed, -torch.inf)
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


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    if k is not None:
        return torch.empty_like(q)
    width = q.shape[2] // (num_heads + 2 * num_kv_heads) * num_heads
    return q.new_empty(q.shape[0], q.shape[1], width)


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
    out: Tensor = _attention(q, k, v, mask, num_heads, num_kv_heads, scale, causal)
    return out


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
    """Attend with repeated key-value heads."""
    q, k, v = numpy_unpack(q, k, v, num_heads, num_kv_heads)
    query = numpy_to_heads(q, num_heads)
    key, value = (
        np.repeat(numpy_to_heads(x, num_kv_heads), num_heads // num_kv_heads, axis=1)
        for x in (k, v)
    )
    scores = query @ key.swapaxes(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        rows, keys = scores.shape[-2:]
        scores = np.where(np.tri(rows, keys, keys - rows, dtype=bool), scores, -np.inf)
    return numpy_from_heads(numpy_softmax(scores) @ value)


def _split(emit: Emitter, node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """q, k and v, split where they are packed."""
    q, k, v, _ = tensors(node, 4)
    assert q is not None
    if k is not None and v is not None:
        return q, k, v
    return split_packed(emit, q, attribute(node, "num_heads"), attribute(node, "num_kv_heads"))


def _contrib(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    num_heads = attribute(node, "num_heads")
    if num_heads != attribute(node, "num_kv_heads"):
        return _standard(emit, node)  # MultiHeadAttention has no key-value groups
    q, k, v = _split(emit, node)
    mask = tensors(node, 4)[3]
    return [
        emit.one(
            "MultiHeadAttention",
            q,
            k,
            v,
            None,
            None,
            mask,
            domain=MICROSOFT,
            num_heads=num_heads,
            scale=attribute(node, "scale"),
            unidirectional=int(attribute(node, "causal")),
        )
    ]


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    num_heads, num_kv_heads = attribute(node, "num_heads"), attribute(node, "num_kv_heads")
    groups = num_heads // num_kv_heads
    batch, rows, width = static_dims(node.inputs[0])
    packed = tensors(node, 2)[1] is None
    size = width // (num_heads + 2 * num_kv_heads if packed else num_heads)
    q, k, v = _split(emit, node)
    keys = rows if packed else static_dims(k)[1]

    def heads(x: ir.Value, count: int, length: int, order: list[int], part: str) -> ir.Value:
        apart = emit.one("Reshape", x, emit.ints(batch, length, count, size), part=f"{part}_heads")
        return emit.one("Transpose", apart, part=part, perm=order)

    query = heads(q, num_heads, rows, [0, 2, 1, 3], "query")
    key = heads(k, num_kv_heads, keys, [0, 2, 3, 1], "key")
    value = heads(v, num_kv_heads, keys, [0, 2, 1, 3], "value")
    query = emit.one("Mul", query, _scale(emit, node), part="scaled")
    if groups > 1:
        grouped = emit.ints(batch, num_kv_heads, groups * rows, size)
        query = emit.one("Reshape", query, grouped, part="grouped")
    scores = emit.one("MatMul", query, key, part="scores")
    mask = tensors(node, 4)[3]
    if attribute(node, "causal"):
        closed = np.triu(np.full((rows, keys), MASKED, dtype=np.float32), keys - rows + 1)
        name = f"{PLUMBING}/causal[{rows}x{keys}]"
        causal = emit.initializer(name, lambda: ir.tensor(closed, name=name))
        scores = _add_mask(emit, scores, causal, (batch, num_kv_heads, groups, rows, keys))
    if mask is not None:
        scores = _add_mask(emit, scores, mask, (batch, num_kv_heads, groups, rows, keys))
    out = emit.one("MatMul", emit.one("Softmax", scores, axis=-1), value, part="values")
    if groups > 1:
        out = emit.one("Reshape", out, emit.ints(batch, num_heads, rows, size), part="ungrouped")
    out = emit.one("Transpose", out, part="rows_first", perm=[0, 2, 1, 3])
    return [emit.one("Reshape", out, emit.ints(batch, rows, num_heads * size), part="rows")]


def _scale(emit: Emitter, node: ir.Node) -> ir.Value:
    rows = node.inputs[0]
    assert rows is not None
    return emit.scalar(attribute(node, "scale"), rows)


def _add_mask(
    emit: Emitter, scores: ir.Value, mask: ir.Value, shape: tuple[int, int, int, int, int]
) -> ir.Value:
    """Add a mask [.., T, S] to grouped scores [B, Hkv, G*T, S]."""
    batch, num_kv_heads, groups, rows, keys = shape
    if groups == 1:
        return emit.one("Add", scores, mask, part="masked")
    flat = emit.ints(batch, num_kv_heads * groups, rows, keys)
    apart = emit.one("Reshape", scores, flat, part="scores_apart")
    masked = emit.one("Add", apart, mask, part="masked")
    together = emit.ints(batch, num_kv_heads, groups * rows, keys)
    return emit.one("Reshape", masked, together, part="scores_together")


OP = Op(
    name="attention",
    overload=torch.ops.edgevlm.attention.default,
    numpy=numpy_attention,
    lowerings={"contrib": _contrib, "standard": _standard},
)
