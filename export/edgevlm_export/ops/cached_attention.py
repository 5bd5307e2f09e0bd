"""Causal attention over a cache that the op extends in place: rotary, scores, softmax, values.

The rows of this call go to the cache slots that follow the used ones, and each sees every used slot
and the rows up to itself. `seqlens_k` is used + T - 1 and `total` is used + T, as in
com.microsoft::GroupQueryAttention. The rotary tables hold the angles of *these* rows, row r in row
r: length and position are two things, and a table of absolute positions could not say so.

A cache may hold numbers of a grid (`edgevlm_export.ops.kv_grid`). Then this call's rows are rounded
first, and are read back as rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
    query_width,
    split_packed,
)
from edgevlm_export.ops.kv_grid import FLOAT8, kept, numpy_kept, numpy_read, read
from edgevlm_export.ops.op import (
    MICROSOFT,
    Op,
    attribute,
    last_dim,
    static_dims,
    tensors,
    torch_op,
)
from edgevlm_export.ops.prompt_attention import lower_prompt
from edgevlm_export.ops.rotary import contrib_rotary, numpy_rotated_heads, rotated_heads


def _empty(
    q: Tensor,
    k: Tensor | None,
    _v: object,
    past_key: Tensor,
    past_value: Tensor,
    _seqlens_k: object,
    _total: object,
    _cos: object,
    _sin: object,
    num_heads: int,
    num_kv_heads: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(*q.shape[:2], query_width(q, k, num_heads, num_kv_heads))
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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    kv_dtype: str = "",
    prompt: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend and return (out [1, T, Hq*D], present_key, present_value [1, Hkv, C, D]).

    q [1, T, Hq*D] and k, v [1, T, Hkv*D]; q is packed q|k|v where k and v are None (the form that
    saves nodes; give three where q and k have norms). `seqlens_k` [1] and `total` [] are int32,
    `cos` and `sin` [C, R] or None. `softcap` 0 caps nothing; `window` counts the row itself, 0 sees
    everything. With `kv_dtype`, the scales [1] or [Hkv, 1, D] and the cache are those of
    `edgevlm_export.ops.kv_grid`, or the cache holds float32 numbers of that grid. `prompt` says
    that a call has many rows, for which another form of the same numbers is quicker.
    """
    query, key, value = rotated_heads(q, k, v, cos, sin, num_heads, num_kv_heads)
    rows, end = q.shape[1], int(seqlens_k[0]) + 1
    present_key, present_value = past_key.clone(), past_value.clone()
    present_key[:, :, end - rows : end] = kept(key, past_key, k_scale, kv_dtype)
    present_value[:, :, end - rows : end] = kept(value, past_value, v_scale, kv_dtype)
    used_keys = read(present_key[:, :, :end], k_scale, kv_dtype)
    used_values = read(present_value[:, :, :end], v_scale, kv_dtype)
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
    k_scale: np.ndarray | None = None,
    v_scale: np.ndarray | None = None,
    kv_dtype: str = "",
    prompt: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Extend the cache, then attend over its used slots."""
    query, key, value = numpy_rotated_heads(q, k, v, cos, sin, num_heads, num_kv_heads)
    rows, end = q.shape[1], int(seqlens_k[0]) + 1
    present_key, present_value = past_key.copy(), past_value.copy()
    present_key[:, :, end - rows : end] = numpy_kept(key, past_key, k_scale, kv_dtype)
    present_value[:, :, end - rows : end] = numpy_kept(value, past_value, v_scale, kv_dtype)
    used_keys = numpy_read(present_key[:, :, :end], k_scale, kv_dtype)
    used_values = numpy_read(present_value[:, :, :end], v_scale, kv_dtype)
    mask = numpy_causal_mask(rows, end, window)
    out = numpy_attend(query, used_keys, used_values, mask, scale, softcap)
    return numpy_from_heads(out), present_key, present_value


def _contrib(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    q, k, v, past_key, past_value, seqlens_k, total, cos, sin, *scales = tensors(node, 11)
    num_heads, num_kv_heads = attribute(node, "num_heads"), attribute(node, "num_kv_heads")
    kv_dtype = attribute(node, "kv_dtype")
    size = kernel_head_size(emit, node, past_key)
    if kv_dtype and attribute(node, "prompt"):
        return lower_prompt(emit, node, size)
    assert q is not None
    if cos is not None and (size % 16 or last_dim(cos) % 8):
        # The kernel turns no such heads, but takes them turned.
        q, k, v = (q, k, v) if k is not None else split_packed(emit, q, num_heads, num_kv_heads)
        q = contrib_rotary(emit, q, cos, sin, num_heads=num_heads, size=size)
        k = contrib_rotary(emit, k, cos, sin, num_heads=num_kv_heads, size=size)
        cos = sin = None
    rows, numbers = q, None
    if cos is not None:
        # One for each state group, whose rows are told apart by its lengths.
        assert seqlens_k is not None
        name = f"{seqlens_k.name}_row_numbers"
        numbers = emit.shared(name, lambda emit: _row_numbers(emit, rows))
    no_bias = no_sink = None
    inputs = [q, k, v, past_key, past_value, seqlens_k, total, cos, sin, numbers, no_bias, no_sink]
    return emit.node(
        "GroupQueryAttention",
        [*inputs, *scales],
        domain=MICROSOFT,
        num_outputs=3,
        **_grid_attributes(kv_dtype, scales),
        num_heads=num_heads,
        kv_num_heads=num_kv_heads,
        scale=attribute(node, "scale"),
        softcap=attribute(node, "softcap"),
        local_window_size=attribute(node, "window") or -1,
        do_rotary=int(cos is not None),
        rotary_interleaved=0,
    )


def kernel_head_size(emit: Emitter, node: ir.Node, past_key: ir.Value | None) -> int:
    """Numbers of a head; ExportError where GroupQueryAttention does not take heads or cache."""
    kv_dtype = attribute(node, "kv_dtype")
    if kv_dtype in FLOAT8:
        raise ExportError(
            f"{emit.site!r} has a cache of {kv_dtype}, GroupQueryAttention takes int8 and int4",
            role=emit.graph.name or "graph",
            op=node.op_type,
            hint="choose int8, or a target of standard ops",
        )
    size = static_dims(past_key)[3] * (2 if kv_dtype == "int4" else 1)
    if size % 8:
        raise ExportError(
            f"{emit.site!r} has heads of {size} numbers, GroupQueryAttention takes multiples of 8",
            role=emit.graph.name or "graph",
            op=node.op_type,
            hint="choose a target of standard ops",
        )
    return size


def _grid_attributes(kv_dtype: str, scales: Sequence[ir.Value | None]) -> dict[str, Any]:
    """What the kernel wants to know of a quantized cache."""
    if not kv_dtype:
        return {}
    kinds = ["PER_TENSOR" if math.prod(static_dims(x)) == 1 else "PER_CHANNEL" for x in scales]
    return {
        "k_quant_type": kinds[0],
        "v_quant_type": kinds[1],
        "kv_cache_bit_width": 4 if kv_dtype == "int4" else 8,
    }


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
