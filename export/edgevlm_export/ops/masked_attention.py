"""Attention over a cache that the host extends, with what may be seen given as an additive mask.

Scores against the cache and against this call's rows are computed apart, so only [T, S+T] numbers
are concatenated and the cache is read where it lies. Returns this call's keys (after rotary) and
values; the host commits the rows it accepts. Where the cache holds numbers of a grid
(`edgevlm_export.ops.kv_grid`), this call's rows are rounded first, are read as rounded, and leave
as the cache keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.grouped import Groups
from edgevlm_export.ops.heads import (
    attend,
    from_heads,
    numpy_attend,
    numpy_from_heads,
    query_width,
)
from edgevlm_export.ops.kv_grid import kept, numpy_kept, numpy_read, read
from edgevlm_export.ops.kv_pairs import KvPairs
from edgevlm_export.ops.op import Op, attribute, static_dims, tensors, torch_op
from edgevlm_export.ops.rotary import (
    numpy_rotated_heads,
    rotated_heads,
    standard_rotary,
)


def _empty(
    q: Tensor,
    k: Tensor | None,
    _v: object,
    past_key: Tensor,
    _past_value: object,
    _mask: object,
    _cos: object,
    _sin: object,
    num_heads: int,
    num_kv_heads: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = q.shape[1]
    new = past_key.new_empty(*past_key.shape[:2], rows, past_key.shape[3])
    out = q.new_empty(q.shape[0], rows, query_width(q, k, num_heads, num_kv_heads))
    return out, new, torch.empty_like(new)


@torch_op("masked_attention", fake=_empty)
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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    kv_dtype: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend and return (out [1, T, Hq*D], new_key, new_value [1, Hkv, T, D]).

    q [1, T, Hq*D] and k, v [1, T, Hkv*D]; q is packed q|k|v where k and v are None. The cache is
    [1, Hkv, S, D]. `mask` [1, 1, T, S+T] is added to the scores: columns 0..S-1 are cache slots,
    the rest this call's rows. Without `cos` and `sin` [T, R] nothing turns. With `kv_dtype`, the
    scales [1] or [Hkv, 1, D] and the cache are those of `edgevlm_export.ops.kv_grid`, or the cache
    holds float32 numbers of that grid, and so do the new rows.
    """
    query, key, value = rotated_heads(q, k, v, cos, sin, num_heads, num_kv_heads)
    key = kept(key, past_key, k_scale, kv_dtype)
    value = kept(value, past_value, v_scale, kv_dtype)
    keys = torch.cat([read(x, k_scale, kv_dtype) for x in (past_key, key)], dim=2)
    values = torch.cat([read(x, v_scale, kv_dtype) for x in (past_value, value)], dim=2)
    out = attend(query, keys, values, mask, scale, softcap)
    return from_heads(out), key.clone(), value.clone()


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
    k_scale: np.ndarray | None = None,
    v_scale: np.ndarray | None = None,
    kv_dtype: str = "",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attend over the cache and the new rows as one."""
    query, key, value = numpy_rotated_heads(q, k, v, cos, sin, num_heads, num_kv_heads)
    key = numpy_kept(key, past_key, k_scale, kv_dtype)
    value = numpy_kept(value, past_value, v_scale, kv_dtype)
    keys = np.concatenate([numpy_read(x, k_scale, kv_dtype) for x in (past_key, key)], axis=2)
    values = np.concatenate([numpy_read(x, v_scale, kv_dtype) for x in (past_value, value)], axis=2)
    out = numpy_attend(query, keys, values, mask, scale, softcap)
    return numpy_from_heads(out), key, value


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    q, _, _, past_key, past_value, mask, _, _, k_scale, v_scale = tensors(node, 10)
    assert q is not None
    assert mask is not None
    assert past_key is not None
    assert past_value is not None
    _, num_kv_heads, slots, size = static_dims(past_key)
    groups = Groups(
        batch=1,
        rows=static_dims(q)[1],
        num_heads=attribute(node, "num_heads"),
        num_kv_heads=num_kv_heads,
        size=size,
    )
    query, key, value = _rotated_heads(emit, node, groups)
    kv_dtype = attribute(node, "kv_dtype")
    keys = KvPairs(emit, k_scale, kv_dtype, part="key")
    values = KvPairs(emit, v_scale, kv_dtype, part="value")
    key, value = keys.rounded(key), values.rounded(value)
    query = groups.heads(emit, query, keys.scaled_queries(attribute(node, "scale"), groups))
    past_columns, new_columns = (
        emit.one("Transpose", keys.restored(x), part=part, perm=[0, 1, 3, 2])
        for x, part in ((past_key, "past_columns"), (key, "new_columns"))
    )
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
    scores = emit.one("Add", scores, groups.mask(emit, mask), part="masked")
    past_weights, new_weights = emit.node(
        "Split",
        [emit.one("Softmax", scores, axis=-1), emit.ints(slots, groups.rows)],
        part="weights",
        num_outputs=2,
        axis=-1,
    )
    out = emit.one(
        "Add",
        emit.one("MatMul", past_weights, values.restored(past_value), part="past_values"),
        emit.one("MatMul", new_weights, values.restored(value), part="new_values"),
        part="values",
    )
    return [groups.rows_of(emit, values.scaled_outputs(out)), key, value]


def _rotated_heads(
    emit: Emitter, node: ir.Node, groups: Groups
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Query, key and value as [1, H, T, D], rotated; packed queries and keys turn together."""
    q, k, v, _, _, _, cos, sin = tensors(node, 8)
    assert q is not None
    rows, size = groups.rows, groups.size
    counts = groups.num_heads, groups.num_kv_heads

    def heads(x: ir.Value, count: int) -> ir.Value:
        if cos is not None and sin is not None:
            return standard_rotary(emit, x, cos, sin, rows=rows, num_heads=count, size=size)
        return emit.one("Reshape", x, emit.ints(1, rows, count, size), part="heads")

    if k is None or v is None:
        widths = emit.ints(sum(counts) * size, groups.num_kv_heads * size)
        turning, v = emit.node("Split", [q, widths], part="packed", num_outputs=2, axis=-1)
        query, key = emit.node(
            "Split",
            [heads(turning, sum(counts)), emit.ints(*counts)],
            part="queries_keys",
            num_outputs=2,
            axis=2,
        )
    else:
        query, key = heads(q, groups.num_heads), heads(k, groups.num_kv_heads)
    shape = emit.ints(1, rows, groups.num_kv_heads, size)
    parts = {"query": query, "key": key, "value": emit.one("Reshape", v, shape, part="value_heads")}
    query, key, value = (
        emit.one("Transpose", x, part=part, perm=[0, 2, 1, 3]) for part, x in parts.items()
    )
    return query, key, value


OP = Op(
    name="masked_attention",
    overload=torch.ops.edgevlm.masked_attention.default,
    numpy=numpy_masked_attention,
    lowerings={"standard": _standard},
)
