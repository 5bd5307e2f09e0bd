"""What the attention ops share: rows to heads and back, masks, and attention by its definition.

Each stands here in torch, which is what runs eagerly, and in numpy, which tests compare with.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import dims

Array = np.ndarray  # any float dtype

# B batch, T rows of this call, S keys, C cache capacity, H heads (Hq query, Hkv key-value), D head
# size, R rotary pairs (half of the rotated width)

# Closes a column of a mask. Finite, in float16 too: a row of padding that sees nothing is no NaN.
CLOSED = -60000.0


def to_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, H*D] -> [B, H, T, D]."""
    batch, rows, width = x.shape
    return x.view(batch, rows, num_heads, width // num_heads).transpose(1, 2)


def from_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H*D]."""
    batch, num_heads, rows, size = x.shape
    return x.transpose(1, 2).reshape(batch, rows, num_heads * size)


def unpack(
    q: Tensor, k: Tensor | None, v: Tensor | None, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split packed rows q|k|v where k and v are absent."""
    if k is not None and v is not None:
        return q, k, v
    size = q.shape[-1] // (num_heads + 2 * num_kv_heads)
    q, k, v = torch.split(q, [num_heads * size, num_kv_heads * size, num_kv_heads * size], dim=-1)
    return q.contiguous(), k.contiguous(), v.contiguous()


def query_width(q: Tensor, k: Tensor | None, num_heads: int, num_kv_heads: int) -> int:
    """Hq*D of queries, or of packed rows q|k|v where k is absent."""
    packed = num_heads + 2 * num_kv_heads
    return q.shape[-1] if k is not None else q.shape[-1] // packed * num_heads


def causal_mask(rows: int, keys: int, window: int = 0, closed: float = -torch.inf) -> Tensor:
    """Additive mask [T, S]: the last row sees the last key, and each row `window` keys (0: all)."""
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    if window:
        seen = seen.triu(keys - rows - window + 1)
    return torch.zeros(rows, keys).masked_fill(~seen, closed)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attend from query [B, Hq, T, D] to key, value [B, Hkv, S, D].

    `mask` is added to the scores, which tanh keeps within `softcap` where that is not 0.
    """
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.softmax(scores + mask, dim=-1) @ value.repeat_interleave(groups, dim=1)


def numpy_to_heads(x: Array, num_heads: int) -> Array:
    """[B, T, H*D] -> [B, H, T, D]."""
    batch, rows, width = x.shape
    heads: Array = x.reshape(batch, rows, num_heads, width // num_heads).transpose(0, 2, 1, 3)
    return heads


def numpy_from_heads(x: Array) -> Array:
    """[B, H, T, D] -> [B, T, H*D]."""
    batch, num_heads, rows, size = x.shape
    joined: Array = x.transpose(0, 2, 1, 3).reshape(batch, rows, num_heads * size)
    return joined


def numpy_unpack(
    q: Array, k: Array | None, v: Array | None, num_heads: int, num_kv_heads: int
) -> tuple[Array, Array, Array]:
    """Split packed rows q|k|v where k and v are absent."""
    if k is not None and v is not None:
        return q, k, v
    size = q.shape[-1] // (num_heads + 2 * num_kv_heads)
    ends = [num_heads * size, (num_heads + num_kv_heads) * size]
    first, second, third = np.split(q, ends, axis=-1)
    return first, second, third


def numpy_causal_mask(rows: int, keys: int, window: int = 0, closed: float = -np.inf) -> Array:
    """Additive mask [T, S], from the places of rows and keys in the sequence."""
    row, key = np.arange(keys - rows, keys)[:, None], np.arange(keys)
    seen = (key <= row) & (key > row - (window or keys))
    return np.where(seen, 0.0, closed).astype(np.float32)


def numpy_attend(
    query: Array, key: Array, value: Array, mask: Array, scale: float, softcap: float = 0.0
) -> Array:
    """Attend head by head; shapes as in `attend`."""
    out = np.zeros_like(query)
    groups = query.shape[1] // key.shape[1]
    mask = np.broadcast_to(mask, (*query.shape[:3], key.shape[2]))
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // groups].swapaxes(-1, -2) * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        scores = scores + mask[:, head]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[:, head] = weights @ value[:, head // groups]
    return out


def split_packed(
    emit: Emitter, packed: ir.Value, num_heads: int, num_kv_heads: int
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Emit the split of rows q|k|v."""
    width = dims(packed)[-1]
    assert isinstance(width, int)
    size = width // (num_heads + 2 * num_kv_heads)
    sizes = emit.ints(num_heads * size, num_kv_heads * size, num_kv_heads * size)
    q, k, v = emit.node("Split", [packed, sizes], part="packed", num_outputs=3, axis=-1)
    return q, k, v
