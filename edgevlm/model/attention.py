"""Attention, in one module for every place that keys and values can come from.

`attention.core` asks its `KeySource` to attend: a source knows which keys a row may see, where they
lie and how they turn. So one module serves whole sequences, a cache that the graph extends, a cache
that the host extends, and the windows of a vision encoder.

Where a cache is quantized, every source that has rows for later calls rounds them first: a whole
sequence without a cache gives the numbers that a cache gives step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from edgevlm.model.bottleneck import Hidden
from edgevlm.model.norms import HeadNorm
from edgevlm.model.spec import AttentionSpec
from edgevlm_export.ops import (
    attention,
    bottleneck_attention,
    cached_attention,
    causal_mask,
    masked_attention,
    rotary,
)
from edgevlm_export.ops.kv_grid import rounded, stored


class KeySource(Protocol):
    """Where the keys and values of a call come from; q is packed q|k|v where k and v are None."""

    def attend(self, core: AttentionCore, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attend from q [B, T, Hq*D] for `core`, and return [B, T, Hq*D]."""
        ...


class TurnedSource(KeySource, Protocol):
    """A source of a decoder layer, whose queries and keys turn with their positions."""

    angles: Angles


class AllRows:
    """The rows of this call see each other: all of them, a vision encoder without rotation."""

    def attend(self, core: AttentionCore, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attend without a mask."""
        spec = core.spec
        return attention(q, k, v, spec.num_heads, spec.num_kv_heads, spec.scale)


class WeightedRows:
    """The same for rows that were merged: one that stands for several is seen so many times.

    The logarithm of its size is added to the scores of its key, which is exact where the merged
    rows were equal (ToMe's proportional attention).
    """

    def __init__(self, sizes: Tensor) -> None:
        """Hold how many rows each stands for, [B, T]."""
        self.sizes = sizes

    def attend(self, core: AttentionCore, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attend with a bias for each key."""
        spec = core.spec
        rows = self.sizes.shape[1]
        mask = self.sizes.log()[:, None, None].expand(-1, -1, rows, -1)
        return attention(q, k, v, spec.num_heads, spec.num_kv_heads, spec.scale, mask=mask)


class Watched:
    """Shows the queries and keys that go by."""

    def __init__(self, source: KeySource) -> None:
        """Hold the source that attends."""
        self.source = source
        self.q: Tensor | None = None
        self.k: Tensor | None = None

    def attend(self, core: AttentionCore, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Take them apart, and let the source attend."""
        self.q, self.k, _ = unpacked(core.spec, q, k, v)
        return self.source.attend(core, q, k, v)


class Angles:
    """Rotary tables of the rows of a call, one object for all layers that see the same rows."""

    def __init__(
        self, cos: Tensor, sin: Tensor, *, is_own: bool = True, is_padded: bool = False
    ) -> None:
        """Hold the tables [rows >= T, R].

        Where they are not a segment's own they are those of the rows that a cut before it leaves.
        `is_padded` says that a cache wants as many rows as it has slots, whatever they hold.
        """
        self.cos, self.sin = cos, sin
        self.is_own, self.is_padded = is_own, is_padded

    def follow(self, tables: tuple[Tensor, Tensor], rows: Tensor | None = None) -> None:
        """Become those of some rows of other tables, or other tables."""
        if self.is_own:
            return
        if rows is None:
            self.cos, self.sin = tables
        else:
            cos, sin = (table.index_select(0, rows) for table in tables)
            if self.is_padded:
                cos, sin = torch.cat([cos, tables[0]]), torch.cat([sin, tables[1]])
            self.cos, self.sin = cos, sin


class FullCache:
    """No state: the rows of this call are the whole sequence, each sees the rows up to itself."""

    def __init__(
        self,
        angles: Angles,
        observe: Callable[[Tensor, Tensor], None] | None = None,
        hidden: Hidden | None = None,
    ) -> None:
        """Hold the rotary tables, and what is hidden from rows behind pictures.

        `observe` is shown what a cache would hold before it is rounded, keys after rotary and
        values, each [B, T, Hkv*D]: calibration of a quantized cache finds its scales there.
        """
        self.angles, self.observe, self.hidden = angles, observe, hidden

    def attend(self, core: AttentionCore, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Rotate, then attend causally, within the layer's window where it has one."""
        spec = core.spec
        q, k, v = unpacked(spec, q, k, v)
        q = rotary(q, self.angles.cos, self.angles.sin, spec.num_heads)
        k = rotary(k, self.angles.cos, self.angles.sin, spec.num_kv_heads)
        if self.observe is not None:
            self.observe(k, v)
        k, v = core.rounded(k, core.k_scale), core.rounded(v, core.v_scale)
        heads = spec.num_heads, spec.num_kv_heads
        if self.hidden is not None:
            return attention(q, k, v, *heads, spec.scale, mask=self.hidden.closed, causal=True)
        if spec.window is None:
            return attention(q, k, v, *heads, spec.scale, causal=True)
        mask = causal_mask(q.shape[1], k.shape[1], spec.window)[None, None]
        return attention(q, k, v, *heads, spec.scale, mask=mask)


class InplaceCache:
    """A cache that the graph extends: this call's rows go to the slots after the used ones."""

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        last_slot: Tensor,
        total: Tensor,
        angles: Angles,
        *,
        prompt: bool = False,
        hidden: Hidden | None = None,
    ) -> None:
        """Hold the buffers [1, Hkv, C, D], used + T - 1 [1], used + T [], and rotary tables.

        `prompt` says that calls have many rows, for which a quantized cache has a quicker form.
        With `hidden` the rows that go to slots are those that stay, and are counted as T.
        """
        self.key, self.value = key, value
        self.last_slot, self.total = last_slot, total
        self.angles = angles
        self.prompt, self.hidden = prompt, hidden

    def attend(self, core: AttentionCore, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attend; `key` and `value` are then the extended buffers."""
        spec = core.spec
        if self.hidden is not None:
            out, self.key, self.value = bottleneck_attention(
                q, k, v, self.key, self.value, self.last_slot, self.total,
                self.hidden.closed, self.hidden.rows, self.angles.cos, self.angles.sin,
                spec.num_heads, spec.num_kv_heads, spec.scale,
                k_scale=core.k_scale, v_scale=core.v_scale, kv_dtype=core.kv_dtype,
            )  # fmt: skip
            return out
        out, self.key, self.value = cached_attention(
            q, k, v, self.key, self.value, self.last_slot, self.total,
            self.angles.cos, self.angles.sin,
            spec.num_heads, spec.num_kv_heads, spec.scale, window=spec.window or 0,
            k_scale=core.k_scale, v_scale=core.v_scale, kv_dtype=core.kv_dtype,
            prompt=self.prompt and spec.kv is not None,
        )  # fmt: skip
        return out


class DeltaCache:
    """A cache that the host extends: the graph reads it and returns this call's rows."""

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        angles: Angles,
        hidden: Hidden | None = None,
    ) -> None:
        """Hold the buffers [1, Hkv, S, D], the additive mask [1, 1, T, S+T] and rotary tables.

        Buffers of a quantized cache may be float32, of numbers that it can hold; then so are the
        new rows. With `hidden`, which the mask says too, new rows are those that stay.
        """
        self.key, self.value = key, value
        self.mask, self.angles, self.hidden = mask, angles, hidden

    def attend(self, core: AttentionCore, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attend; `key` and `value` are then this call's rows [1, Hkv, T, D], after rotary."""
        spec = core.spec
        out, self.key, self.value = masked_attention(
            q, k, v, self.key, self.value, self.mask, self.angles.cos, self.angles.sin,
            spec.num_heads, spec.num_kv_heads, spec.scale,
            k_scale=core.k_scale, v_scale=core.v_scale, kv_dtype=core.kv_dtype,
        )  # fmt: skip
        if self.hidden is not None:
            rows = self.hidden.rows
            self.key, self.value = (x.index_select(2, rows) for x in (self.key, self.value))
        return out


class AttentionCore(nn.Module):
    """Rotation, scores, softmax and values, and the scales of a quantized cache."""

    def __init__(self, spec: AttentionSpec) -> None:
        """Hold the numbers of the heads; scales are one until a calibration sets them."""
        super().__init__()
        self.spec = spec
        self.kv_dtype = "" if spec.kv is None else spec.kv.dtype
        self.k_scale, self.v_scale = _scale(spec), _scale(spec)

    def forward(self, q: Tensor, k: Tensor | None, v: Tensor | None, keys: KeySource) -> Tensor:
        """Attend to what `keys` offers."""
        return keys.attend(self, q, k, v)

    def stored(self, rows: Tensor, scale: Tensor | None) -> Tensor:
        """Keys or values [B, Hkv, S, D] as the cache keeps them."""
        return rows if scale is None else stored(rows, scale, self.kv_dtype)

    def rounded(self, rows: Tensor, scale: Tensor | None) -> Tensor:
        """Keys or values [B, T, Hkv*D] as numbers that the cache can hold."""
        return rows if scale is None else rounded(rows, scale.flatten(), self.kv_dtype)


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
        return self.attend(*self.project(x), keys)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries, keys and values of rows [B, T, W]; packed in the first where none has a norm."""
        qkv = self.qkv(x)
        if self.q_norm is None or self.k_norm is None:
            return qkv, None, None
        q, k, v = unpacked(self.spec, qkv, None, None)
        return self.q_norm(q), self.k_norm(k), v

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, keys: KeySource) -> Tensor:
        """What rows [B, T, W] get, from what `project` made of them."""
        out: Tensor = self.out(self.core(q, k, v, keys))
        return out


def _scale(spec: AttentionSpec) -> nn.Parameter | None:
    """Ones, for a tensor [1] or its channels [Hkv, 1, D]; None where the cache is float32."""
    if spec.kv is None:
        return None
    is_whole = spec.kv.granularity == "tensor"
    shape = (1,) if is_whole else (spec.num_kv_heads, 1, spec.head_dim)
    return nn.Parameter(torch.ones(shape), requires_grad=False)


def unpacked(
    spec: AttentionSpec, q: Tensor, k: Tensor | None, v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v apart."""
    if k is not None and v is not None:
        return q, k, v
    q, k, v = torch.split(q, [spec.q_width, spec.kv_width, spec.kv_width], dim=-1)
    return q, k, v
