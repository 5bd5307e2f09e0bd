"""Causal attention over a cache that the op extends in place: rotary, scores, softmax, values.

The rows of this call go to the cache slots that follow the used ones, and each sees every used slot
and the rows up to itself. `seqlens_k` is used + T - 1 and `total` is used + T, as in
com.microsoft::GroupQueryAttention. The rotary tables hold the angles of *these* rows, row r in row
r: length and position are two things, and a table of absolute positions could not say so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgevlm_export.ops.heads import from_heads, to_heads, unpack
from edgevlm_export.ops.rotary import rotate


@torch.library.custom_op("edgevlm::cached_attention", mutates_args=())
def _cached_attention(
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
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = unpack(q, k, v, num_heads, num_kv_heads)
    query, key, value = to_heads(q, num_heads), to_heads(k, num_kv_heads), to_heads(v, num_kv_heads)
    if cos is not None and sin is not None:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    rows, end = q.shape[1], int(seqlens_k[0]) + 1
    present_key, present_value = past_key.clone(), past_value.clone()
    present_key[:, :, end - rows : end] = key
    present_value[:, :, end - rows : end] = value

    groups = num_heads // num_kv_heads
    scores = query @ present_key[:, :, :end].repeat_interleave(groups, dim=1).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = torch.ones(rows, end, dtype=torch.bool).tril(end - rows)
    if window:
        allowed = allowed.triu(end - rows - window + 1)
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)
    out = weights @ present_value[:, :, :end].repeat_interleave(groups, dim=1)
    return from_heads(out), present_key, present_value


@_cached_attention.register_fake
def _(
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
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], num_heads * past_key.shape[3])
    return out, torch.empty_like(past_key), torch.empty_like(past_value)


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

    q is packed q|k|v where k and v are None (the form that saves nodes; give three where q and k
    have norms). `softcap` 0 caps nothing; `window` counts the row itself, 0 sees everything.
    """
    out: tuple[Tensor, Tensor, Tensor] = _cached_attention(
        q, k, v, past_key, past_value, seqlens_k, total, cos, sin,
        num_heads, num_kv_heads, scale, softcap, window,
    )  # fmt: skip
    return out
