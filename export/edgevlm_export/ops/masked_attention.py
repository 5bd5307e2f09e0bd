"""Attention over a cache that the host extends, with what may be seen given as an additive mask.

Scores against the cache and against this call's rows are computed apart, so only [T, S+T] numbers
are concatenated and the cache is read where it lies. Returns this call's keys (after rotary) and
values; the host commits the rows it accepts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgevlm_export.ops.heads import from_heads, to_heads, unpack
from edgevlm_export.ops.rotary import rotate


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
