"""Causal attention of a call of which some rows are hidden from others, and only some are kept.

All rows of the call attend, each to every used slot and to the rows up to itself that are not
closed to it; the rows that stay go to the slots that follow the used ones. It is how a prompt is
read whose pictures are seen from behind through a few rows alone (VoCo-LLaMA): what no later row
sees takes no slot. `seqlens_k` is used + L - 1 and `total` is used + L, for L rows that stay, as
the host counts them.

The contrib form lets GroupQueryAttention attend with a bias, to a copy of the used slots, and
scatters the rows that stay into the cache, which stays bound in place. The static form is
`masked_attention`, whose host commits the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.cached_attention import kernel_head_size
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
from edgevlm_export.ops.kv_grid import kept, numpy_kept, numpy_read, read
from edgevlm_export.ops.op import MICROSOFT, Op, attribute, tensors, torch_op
from edgevlm_export.ops.prompt_attention import Grid, new_slots, released, used_slots
from edgevlm_export.ops.rotary import contrib_rotary, numpy_rotated_heads, rotated_heads

# T rows of the call, L of them that stay, U used slots before it, C slots


def _empty(
    q: Tensor,
    k: Tensor | None,
    _v: object,
    past_key: Tensor,
    past_value: Tensor,
    _seqlens_k: object,
    _total: object,
    _closed: object,
    _rows: object,
    _cos: object,
    _sin: object,
    num_heads: int,
    num_kv_heads: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(*q.shape[:2], query_width(q, k, num_heads, num_kv_heads))
    return out, torch.empty_like(past_key), torch.empty_like(past_value)


@torch_op("bottleneck_attention", fake=_empty)
def bottleneck_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total: Tensor,
    closed: Tensor,
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    kv_dtype: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend and return (out [1, T, Hq*D], present_key, present_value [1, Hkv, C, D]).

    q [1, T, Hq*D] and k, v [1, T, Hkv*D]; q is packed q|k|v where k and v are None. `seqlens_k` [1]
    and `total` [] are int32 and count the rows that stay, `rows` [L] int64, ascending. `closed`
    [1, 1, T, T] is added to the scores of this call's rows, which are causal besides. `cos` and
    `sin` [>= T, R] turn row r by row r. Scales and caches are those of `cached_attention`.
    """
    query, key, value = rotated_heads(q, k, v, cos, sin, num_heads, num_kv_heads)
    key = kept(key, past_key, k_scale, kv_dtype)
    value = kept(value, past_value, v_scale, kv_dtype)
    count, end = q.shape[1], int(seqlens_k[0]) + 1
    used = end - len(rows)
    keys, values = (
        read(torch.cat([past[:, :, :used], new], 2), grid, kv_dtype)
        for past, new, grid in ((past_key, key, k_scale), (past_value, value, v_scale))
    )
    mask = torch.cat([closed.new_zeros(1, 1, count, used), closed], -1)
    out = attend(query, keys, values, mask + causal_mask(count, used + count), scale, 0.0)
    present_key, present_value = past_key.clone(), past_value.clone()
    present_key[:, :, used:end] = key[:, :, rows]
    present_value[:, :, used:end] = value[:, :, rows]
    return from_heads(out), present_key, present_value


def numpy_bottleneck_attention(
    q: np.ndarray,
    k: np.ndarray | None,
    v: np.ndarray | None,
    past_key: np.ndarray,
    past_value: np.ndarray,
    seqlens_k: np.ndarray,
    total: np.ndarray,
    closed: np.ndarray,
    rows: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    k_scale: np.ndarray | None = None,
    v_scale: np.ndarray | None = None,
    kv_dtype: str = "",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attend over used slots and new rows as one, then put the rows that stay into the cache."""
    query, key, value = numpy_rotated_heads(q, k, v, cos, sin, num_heads, num_kv_heads)
    key = numpy_kept(key, past_key, k_scale, kv_dtype)
    value = numpy_kept(value, past_value, v_scale, kv_dtype)
    count, end = q.shape[1], int(total)
    used = end - len(rows)
    keys, values = (
        numpy_read(np.concatenate([past[:, :, :used], new], 2), grid, kv_dtype)
        for past, new, grid in ((past_key, key, k_scale), (past_value, value, v_scale))
    )
    mask = numpy_causal_mask(count, used + count) + np.pad(closed[0, 0], ((0, 0), (used, 0)))
    out = numpy_attend(query, keys, values, mask, scale, 0.0)
    present_key, present_value = past_key.copy(), past_value.copy()
    for slot, row in enumerate(rows, used):
        present_key[:, :, slot] = key[:, :, row]
        present_value[:, :, slot] = value[:, :, row]
    return numpy_from_heads(out), present_key, present_value


def _contrib(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    q, k, v, past_key, past_value, seqlens_k, total, closed, rows, cos, sin, *scales = tensors(
        node, 13
    )
    num_heads, num_kv_heads = attribute(node, "num_heads"), attribute(node, "num_kv_heads")
    kv_dtype, size = attribute(node, "kv_dtype"), kernel_head_size(emit, node, past_key)
    assert q is not None
    assert seqlens_k is not None
    last_slot, given = seqlens_k, closed
    grids = [
        Grid(emit, scale, kv_dtype, num_kv_heads, size) if kv_dtype else None for scale in scales
    ]
    if k is None or v is None:
        q, k, v = split_packed(emit, q, num_heads, num_kv_heads)
    q = contrib_rotary(emit, q, cos, sin, num_heads=num_heads, size=size)
    k = contrib_rotary(emit, k, cos, sin, num_heads=num_kv_heads, size=size)
    # What layers share is asked of the numbers of the rows that stay, not of the rows of a layer.
    group = f"{last_slot.name}_staying"
    line = emit.shared(f"{group}_line", lambda emit: emit.one("Unsqueeze", rows, emit.ints(0)))
    slots = emit.shared(
        f"{group}_slots_x{num_kv_heads}",
        lambda emit: new_slots(emit, used_slots(emit, line, last_slot), line, num_kv_heads),
    )
    bias = emit.shared(
        f"{group}_bias", lambda emit: _bias(emit, used_slots(emit, line, last_slot), given)
    )
    gone = emit.shared(f"{group}_gone", lambda emit: _gone(emit, line, given))
    news, stays = [], []
    for new, grid in zip((k, v), grids, strict=True):
        if grid is None:
            heads = emit.ints(1, -1, num_kv_heads, size)
            numbers, codes = new, emit.one("Reshape", new, heads, part="new_heads")
        else:
            numbers, codes = grid.rounded(new)
        news.append(numbers)
        stays.append(emit.one("Gather", codes, rows, part="stays", axis=1))
    # Asked of the rows of this layer, or the used slots of all layers would be copied at once.
    used = used_slots(emit, stays[0], last_slot)
    olds, presents = [], []
    for past, grid, codes in zip((past_key, past_value), grids, stays, strict=True):
        old = emit.one("Slice", past, emit.ints(0), used, emit.ints(2), part="used")
        olds.append(old if grid is None else grid.restored(old))
        presents.append(emit.one("ScatterND", past, slots, codes, part="present"))
    all_rows = emit.one("Add", total, emit.one("Squeeze", gone), part="all_rows")
    last_row = emit.one("Add", last_slot, gone, part="last_row")
    no_tables = no_numbers = None
    out, *extended = emit.node(
        "GroupQueryAttention",
        [q, *news, *olds, last_row, all_rows, no_tables, no_tables, no_numbers, bias],
        domain=MICROSOFT,
        num_outputs=3,
        num_heads=num_heads,
        kv_num_heads=num_kv_heads,
        scale=attribute(node, "scale"),
        local_window_size=-1,
    )
    return [released(emit, out, extended, num_heads * size), *presents]


def _bias(emit: Emitter, used: ir.Value, closed: ir.Value | None) -> ir.Value:
    """[1, 1, T, U + T]: used slots are open to all rows."""
    assert closed is not None
    count = emit.one("Shape", closed, start=2, end=3)
    shape = emit.one("Concat", emit.ints(1, 1), count, used, axis=0)
    past = emit.one("Expand", emit.scalar(0.0, closed), shape)
    return emit.one("Concat", past, closed, axis=-1)


def _gone(emit: Emitter, line: ir.Value, closed: ir.Value | None) -> ir.Value:
    """T - L, int32 [1]."""
    count = emit.one("Shape", closed, start=2, end=3)
    stay = emit.one("Shape", line, start=1, end=2)
    return emit.one("Cast", emit.one("Sub", count, stay), to=ir.DataType.INT32)


OP = Op(
    name="bottleneck_attention",
    overload=torch.ops.edgevlm.bottleneck_attention.default,
    numpy=numpy_bottleneck_attention,
    lowerings={"contrib": _contrib},
)
