"""Rows to heads and back, shared by the attention ops and their numpy references."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter

Array = np.ndarray  # any float dtype

# B batch, T rows of this call, S keys, C cache capacity, H heads (Hq query, Hkv key-value), D head
# size, R rotary pairs (half of the rotated width)


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


def numpy_softmax(scores: Array) -> Array:
    """Softmax over the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    total: Array = weights / weights.sum(axis=-1, keepdims=True)
    return total


def split_packed(
    emit: Emitter, packed: ir.Value, num_heads: int, num_kv_heads: int
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Emit the split of rows q|k|v."""
    assert packed.shape is not None
    width = packed.shape[-1]
    assert isinstance(width, int)
    size = width // (num_heads + 2 * num_kv_heads)
    sizes = emit.ints(num_heads * size, num_kv_heads * size, num_kv_heads * size)
    q, k, v = emit.node("Split", [packed, sizes], part="packed", num_outputs=3, axis=-1)
    return q, k, v
