"""Stateless attention: every key is a row of this call."""

from __future__ import annotations

import torch
from torch import Tensor

from edgevlm_export.ops.heads import from_heads, to_heads, unpack


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
