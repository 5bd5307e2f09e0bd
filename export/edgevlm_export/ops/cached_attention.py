"""Causal attention over a cache that the op extends in place: rotary, scores, softmax, values.

The rows of this call go to the cache slots that follow the used ones, and each sees every used slot
and the rows up to itself. `seqlens_k` is used + T - 1 and `total` is used + T, as in
com.microsoft::GroupQueryAttention. The rotary tables hold the angles of *these* rows, row r in row
r: length and position are two things, and a table of absolute positions could not say so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.errors import ExportError
from edgevlm_export.ops.heads import (
    attend,
    causal_mask,
    from_heads,
    numpy_attend,
    numpy_causal_mask,
    numpy_from_heads,
    split_packed,
)
from edgevlm_export.ops.op import MICROSOFT, Op, attribute, static_dims, tensors, torch_op
from edgevlm_export.ops.rotary import contrib_rotary, numpy_rotated_heads, rotated_heads


def _empty(
    q: Tensor,
    _k: object,
    _v: object,
    past_key: Tensor,
    past_value: Tensor,
    _seqlens_k: object,
    _total: object,
    _cos: object,
    _sin: object,
    num_heads: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], num_heads * past_key.shape[3])
    return out, torch.empty_like(past_key), torch.empty_like(past_value)


@torch_op("cached_attention", fake=_empty)
def cached_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend and return (out [1, T, Hq*D], present_key, present_value [1, Hkv, C, D]).

    q [1, T, Hq*D] and k, v [1, T, Hkv*D]; q is packed q|k|v where k and v are None (the form that
    saves nodes; give three where q and k have norms). `seqlens_k` [1] and `total` [] are int32,
    `cos` and `sin` [C, R] or None. `softcap` 0 caps nothing; `window` counts the row itself, 0 sees
    everything.
    """
    query, key, value = rotated_heads(q, k, v, cos, sin, num_heads, num_kv_heads)
    rows, end = q.shape[1], int(seqlens_k[0]) + 1
    present_key, present_value = past_key.clone(), past_value.clone()
    present_key[:, :, end - rows : end] = key
    present_value[:, :, end - rows : end] = value
    used_keys, used_values = present_key[:, :, :end], present_value[:, :, :end]
    mask = causal_mask(rows, end, window)
    out = attend(query, used_keys, used_values, mask, scale, softcap)
    return from_heads(out), present_key, present_value


def numpy_cached_attention(
    q: np.ndarray,
    k: np.ndarray | None,
    v: np.ndarray | None,
    past_key: np.ndarray,
    past_value: np.ndarray,
    seqlens_k: np.ndarray,
    total: np.ndarray,
    cos: np.ndarray | None,
    sin: np.ndarray | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Extend the cache, then attend over its used slots."""
    query, key, value = numpy_rotated_heads(q, k, v, cos, sin, num_heads, num_kv_heads)
    rows, end = q.shape[1], int(seqlens_k[0]) + 1
    present_key, present_value = past_key.copy(), past_value.copy()
    present_key[:, :, end - rows : end] = key
    present_value[:, :, end - rows : end] = value
    used_keys, used_values = present_key[:, :, :end], present_value[:, :, :end]
    mask = numpy_causal_mask(rows, end, window)
    out = numpy_attend(query, used_keys, used_values, mask, scale, softcap)
    return numpy_from_heads(out), present_key, present_value


def _contrib(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    q, k, v, past_key, past_value, seqlens_k, total, cos, sin = tensors(node, 9)
    num_heads, num_kv_heads = attribute(node, "num_heads"), attribute(node, "num_kv_heads")
    size = static_dims(past_key)[3]
    if size % 8:
        raise ExportError(
            f"{emit.site!r} has heads of {size} numbers, GroupQueryAttention takes multiples of 8",
            role=emit.graph.name or "graph",
            op=node.op_type,
            hint="choose a target of standard ops",
        )
    assert q is not None
    if cos is not None and (size % 16 or static_dims(cos)[1] % 8):
        # The kernel turns no such heads, but takes them turned.
        q, k, v = (q, k, v) if k is not None else split_packed(emit, q, num_heads, num_kv_heads)
        q = contrib_rotary(emit, q, cos, sin, num_heads=num_heads, size=size)
        k = contrib_rotary(emit, k, cos, sin, num_heads=num_kv_heads, size=size)
        cos = sin = None
    rows, numbers = q, None
    if cos is not None:
        numbers = emit.shared("row_numbers", lambda emit: _row_numbers(emit, rows))
    return emit.node(
        "GroupQueryAttention",
        [q, k, v, past_key, past_value, seqlens_k, total, cos, sin, numbers],
        domain=MICROSOFT,
        num_outputs=3,
        num_heads=num_heads,
        kv_num_heads=num_kv_heads,
        scale=attribute(node, "scale"),
        softcap=attribute(node, "softcap"),
        local_window_size=attribute(node, "window") or -1,
        do_rotary=int(cos is not None),
        rotary_interleaved=0,
    )


def _row_numbers(emit: Emitter, rows: ir.Value) -> ir.Value:
    """[[0, 1, ... T-1]] for rows [1, T, ...]: which rows of the rotary tables to use."""
    count = emit.one("Squeeze", emit.one("Shape", rows, start=1, end=2))
    zero, one = (emit.constant(np.array(x, dtype=np.int64)) for x in (0, 1))
    return emit.one("Unsqueeze", emit.one("Range", zero, count, one), emit.ints(0))


OP = Op(
    name="cached_attention",
    overload=torch.ops.edgevlm.cached_attention.default,
    numpy=numpy_cached_attention,
    lowerings={"contrib": _contrib},
)
