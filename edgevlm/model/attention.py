"""Attention, in one module for every place that keys and values can come from.

`attention.core` asks its `KeySource` to attend: a source knows which keys a row may see, where they
lie and how they turn. So one module serves whole sequences, a cache that the graph extends, a cache
that the host extends, and the windows of a vision encoder.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from edgevlm.model.norms import HeadNorm
from edgevlm.model.spec import AttentionSpec
from edgevlm_export.ops import attention, cached_attention, causal_mask, masked_attention, rotary


class KeySource(Protocol):
    """Where the keys and values of a call come from; q is packed q|k|v where k and v are None."""

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attend from q [B, T, Hq*D], and return [B, T, Hq*D]."""
        ...


class AllRows:
    """The rows of this call see each other: all of them, a vision encoder without rotation."""

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attend without a mask."""
        return attention(q, k, v, spec.num_heads, spec.num_kv_heads, spec.scale)


class FullCache:
    """No state: the rows of this call are the whole sequence, each sees the rows up to itself."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        """Hold the rotary tables [T, R]."""
        self.cos, self.sin = cos, sin

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Rotate, then attend causally, within the layer's window where it has one."""
        q, k, v = unpacked(spec, q, k, v)
        q = rotary(q, self.cos, self.sin, spec.num_heads)
        k = rotary(k, self.cos, self.sin, spec.num_kv_heads)
        heads = spec.num_heads, spec.num_kv_heads
        if spec.window is None:
            return attention(q, k, v, *heads, spec.scale, causal=True)
        mask = causal_mask(q.shape[1], k.shape[1], spec.window)[None, None]
        return attention(q, k, v, *heads, spec.scale, mask=mask)


class InplaceCache:
    """A cache that the graph extends: this call's rows go to the slots after the used ones."""

    def __init__(
        self, key: Tensor, value: Tensor, last_slot: Tensor, total: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        """Hold the buffers [1, Hkv, C, D], used + T - 1 [1], used + T [], and rotary rows."""
        self.key, self.value = key, value
        self.last_slot, self.total = last_slot, total
        self.cos, self.sin = cos, sin

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attend; `key` and `value` are then the extended buffers."""
        out, self.key, self.value = cached_attention(
            q, k, v, self.key, self.value, self.last_slot, self.total, self.cos, self.sin,
            spec.num_heads, spec.num_kv_heads, spec.scale, window=spec.window or 0,
        )  # fmt: skip
        return out


class DeltaCache:
    """A cache that the host extends: the graph reads it and returns this call's rows."""

    def __init__(self, key: Tensor, value: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Hold the buffers [1, Hkv, S, D], the additive mask [1, 1, T, S+T] and rotary rows."""
        self.key, self.value = key, value
        self.mask, self.cos, self.sin = mask, cos, sin

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attend; `key` and `value` are then this call's rows [1, Hkv, T, D], after rotary."""
        out, self.key, self.value = masked_attention(
            q, k, v, self.key, self.value, self.mask, self.cos, self.sin,
            spec.num_heads, spec.num_kv_heads, spec.scale,
        )  # fmt: skip
        return out


class AttentionCore(nn.Module):
    """Rotation, scores, softmax and values."""

    def __init__(self, spec: AttentionSpec) -> None:
        """Hold the numbers of the heads."""
        super().__init__()
        self.spec = spec

    def forward(self, q: Tensor, k: Tensor | None, v: Tensor | None, keys: KeySource) -> Tensor:
        """Attend to what `keys` offers."""
        return keys.attend(self.spec, q, k, v)


class Attention(nn.Module):
    """Projection to q|k|v, norms of the heads where there are any, attention, projection back."""

    def __init__(self, width: int, spec: AttentionSpec) -> None:
        """Build the projections; q, k and v are one."""
        super().__init__()
        self.spec = spec
        self.qkv = nn.Linear(width, spec.q_width + 2 * spec.kv_width, bias=spec.qkv_bias)
        self.q_norm = HeadNorm(spec.head_dim, spec.q_norm) if spec.q_norm else None
        self.k_norm = HeadNorm(spec.head_dim, spec.k_norm) if spec.k_norm else None
        self.core = AttentionCore(spec)
        self.out = nn.Linear(spec.q_width, width, bias=spec.out_bias)

    def forward(self, x: Tensor, keys: KeySource) -> Tensor:
        """Attend from [B, T, W]."""
        qkv = self.qkv(x)
        if self.q_norm is None or self.k_norm is None:
            out: Tensor = self.out(self.core(qkv, None, None, keys))
            return out
        q, k, v = unpacked(self.spec, qkv, None, None)
        out = self.out(self.core(self.q_norm(q), self.k_norm(k), v, keys))
        return out


def unpacked(
    spec: AttentionSpec, q: Tensor, k: Tensor | None, v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v apart."""
    if k is not None and v is not None:
        return q, k, v
    q, k, v = torch.split(q, [spec.q_width, spec.kv_width, spec.kv_width], dim=-1)
    return q, k, v
