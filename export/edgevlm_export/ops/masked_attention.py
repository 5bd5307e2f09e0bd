"""Attention over a cache that the host extends, with what may be seen given as an additive mask.

Scores against the cache and against this call's rows are computed apart, so only [T, S+T] numbers
are concatenated and the cache is read where it lies. Returns this call's keys (after rotary) and
values; the host commits the rows it accepts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.heads import (
    from_heads,
    numpy_from_heads,
    numpy_softmax,
    numpy_to_heads,
    numpy_unpack,
    to_heads,
    unpack,
)
from edgevlm_export.ops.op import Op, attribute, static_dims, tensors
from edgevlm_export.ops.rotary import numpy_rotate, rotate, rotate_rows


@torch.library.custom_op("edgevlm::masked_attention", mutates_args=())
def _masked_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = unpack(q, k, v, num_heads, num_kv_heads)
    query, key, value = to_heads(q, num_heads), to_heads(k, num_kv_heads), to_heads(v, num_kv_heads)
    if cos is not None and sin is not None:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    groups = num_heads // num_kv_heads
    keys = torch.cat([past_key, key], dim=2).repeat_interleave(groups, dim=1)
    values = torch.cat([past_value, value], dim=2).repeat_interleave(groups, dim=1)
    scores = query @ keys.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    out = torch.softmax(scores + mask, dim=-1) @ values
    return from_heads(out), key.clone(), value.clone()


@_masked_attention.register_fake
def _(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, size = q.shape[1], past_key.shape[3]
    out = q.new_empty(q.shape[0], rows, num_heads * size)
    new = past_key.new_empty(past_key.shape[0], num_kv_heads, rows, size)
    return out, new, torch.empty_like(new)


def masked_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend and return (out [1, T, Hq*D], new_key, new_value [1, Hkv, T, D]).

    q is packed q|k|v where k and v are None. `mask` [1, 1, T, S+T] is added to the scores: columns
    0..S-1 are cache slots, the rest this call's rows.
    """
    out: tuple[Tensor, Tensor, Tensor] = _masked_attention(
        q, k, v, past_key, past_value, mask, cos, sin, num_heads, num_kv_heads, scale, softcap
    )
    return out


def numpy_masked_attention(
    q: np.ndarray,
    k: np.ndarray | None,
    v: np.ndarray | None,
    past_key: np.ndarray,
    past_value: np.ndarray,
    mask: np.ndarray,
    cos: np.ndarray | None,
    sin: np.ndarray | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attend head by head over the cache and the new rows as one."""
    q, k, v = numpy_unpack(q, k, v, num_heads, num_kv_heads)
    query, key = numpy_to_heads(q, num_heads), numpy_to_heads(k, num_kv_heads)
    value = numpy_to_heads(v, num_kv_heads)
    if cos is not None and sin is not None:
        query, key = numpy_rotate(query, cos, sin), numpy_rotate(key, cos, sin)
    keys = np.concatenate([past_key, key], axis=2)
    values = np.concatenate([past_value, value], axis=2)
    out = np.zeros_like(query)
    for head in range(num_heads):
        source = head // (num_heads // num_kv_heads)
        scores = query[:, head] @ keys[:, source].swapaxes(-1, -2) * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        out[:, head] = numpy_softmax(scores + mask[:, 0]) @ values[:, source]
    return numpy_from_heads(out), key, value


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    q, k, v, past_key, past_value, mask, cos, sin = tensors(node, 8)
    assert q is not None
    assert past_key is not None
    assert mask is not None
    num_heads, num_kv_heads = attribute(node, "num_heads"), attribute(node, "num_kv_heads")
    groups = num_heads // num_kv_heads
    _, _, slots, size = static_dims(past_key)
    rows = static_dims(q)[1]

    query, key, value = _rotated_heads(emit, (q, k, v), (cos, sin), num_heads, num_kv_heads, size)
    query = emit.one("Mul", query, emit.scalar(attribute(node, "scale"), q), part="scaled")
    if groups > 1:
        grouped = emit.ints(1, num_kv_heads, groups * rows, size)
        query = emit.one("Reshape", query, grouped, part="grouped")
    past_columns = emit.one("Transpose", past_key, part="past_columns", perm=[0, 1, 3, 2])
    new_columns = emit.one("Transpose", key, part="new_columns", perm=[0, 1, 3, 2])
    scores = emit.one(
        "Concat",
        emit.one("MatMul", query, past_columns, part="past_scores"),
        emit.one("MatMul", query, new_columns, part="new_scores"),
        part="scores",
        axis=-1,
    )
    softcap = attribute(node, "softcap")
    if softcap:
        bent = emit.one("Tanh", emit.one("Div", scores, emit.scalar(softcap, q)))
        scores = emit.one("Mul", bent, emit.scalar(softcap, q), part="capped")
    if groups > 1:
        copies = [mask] * groups
        mask = emit.shared(
            f"{mask.name}_x{groups}", lambda emit: emit.one("Concat", *copies, axis=2)
        )
    weights = emit.one("Softmax", emit.one("Add", scores, mask, part="masked"), axis=-1)
    past_weights, new_weights = emit.node(
        "Split", [weights, emit.ints(slots, rows)], part="weights", num_outputs=2, axis=-1
    )
    out = emit.one(
        "Add",
        emit.one("MatMul", past_weights, past_value, part="past_values"),
        emit.one("MatMul", new_weights, value, part="new_values"),
        part="values",
    )
    if groups > 1:
        out = emit.one("Reshape", out, emit.ints(1, num_heads, rows, size), part="ungrouped")
    out = emit.one("Transpose", out, part="rows_first", perm=[0, 2, 1, 3])
    out = emit.one("Reshape", out, emit.ints(1, rows, num_heads * size), part="rows")
    return [out, key, value]


def _rotated_heads(
    emit: Emitter,
    inputs: tuple[ir.Value, ir.Value | None, ir.Value | None],
    tables: tuple[ir.Value | None, ir.Value | None],
    num_heads: int,
    num_kv_heads: int,
    size: int,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Query, key and value as [1, H, T, D], rotated; packed queries and keys turn together."""
    (q, k, v), (cos, sin) = inputs, tables
    rows = static_dims(q)[1]

    def heads(x: ir.Value, count: int) -> ir.Value:
        if cos is not None and sin is not None:
            return rotate_rows(emit, x, cos, sin, rows=rows, num_heads=count, size=size)
        return emit.one("Reshape", x, emit.ints(1, rows, count, size), part="heads")

    def first(x: ir.Value, part: str) -> ir.Value:
        return emit.one("Transpose", x, part=part, perm=[0, 2, 1, 3])

    if k is None or v is None:
        widths = emit.ints((num_heads + num_kv_heads) * size, num_kv_heads * size)
        turning, v = emit.node("Split", [q, widths], part="packed", num_outputs=2, axis=-1)
        query, key = emit.node(
            "Split",
            [heads(turning, num_heads + num_kv_heads), emit.ints(num_heads, num_kv_heads)],
            part="queries_keys",
            num_outputs=2,
            axis=2,
        )
    else:
        query, key = heads(q, num_heads), heads(k, num_kv_heads)
    apart = emit.one("Reshape", v, emit.ints(1, rows, num_kv_heads, size), part="value_heads")
    return first(query, "query"), first(key, "key"), first(apart, "value")


OP = Op(
    name="masked_attention",
    overload=torch.ops.edgevlm.masked_attention.default,
    numpy=numpy_masked_attention,
    lowerings={"standard": _standard},
)
