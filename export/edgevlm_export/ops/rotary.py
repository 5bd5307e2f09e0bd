"""Rotary position embedding in the half layout: feature i turns with feature i + R.

The tables hold one row per row of x: [rows >= T, R], or [B, T, R] where a batch has positions of
its own. A table narrower than half a head rotates the head's first 2R features only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.heads import (
    from_heads,
    numpy_from_heads,
    numpy_to_heads,
    numpy_unpack,
    to_heads,
    unpack,
)
from edgevlm_export.ops.op import (
    MICROSOFT,
    Op,
    attribute,
    dims,
    last_dim,
    static_dims,
    torch_op,
)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, H, T, D]."""
    rows, pairs = x.shape[2], cos.shape[-1]
    cos, sin = (table[..., :rows, :].unsqueeze(-3) for table in (cos, sin))
    first, second, rest = torch.split(x, [pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def rotated_heads(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, Hq, T, D], key and value [B, Hkv, T, D] of rows, packed q|k|v or three."""
    q, k, v = unpack(q, k, v, num_heads, num_kv_heads)
    query, key = to_heads(q, num_heads), to_heads(k, num_kv_heads)
    if cos is not None and sin is not None:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    return query, key, to_heads(v, num_kv_heads)


@torch_op("rotary", fake=lambda x, *_: torch.empty_like(x))
def rotary(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotate the heads of [B, T, H*D]."""
    return from_heads(rotate(to_heads(x, num_heads), cos, sin))


def numpy_rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate [B, H, T, D] by tables [rows >= T, R]."""
    rows, pairs = x.shape[2], cos.shape[-1]
    cos, sin = cos[..., :rows, :][..., None, :, :], sin[..., :rows, :][..., None, :, :]
    out: np.ndarray = x.copy()
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    out[..., :pairs] = first * cos - second * sin
    out[..., pairs : 2 * pairs] = second * cos + first * sin
    return out


def numpy_rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, num_heads: int) -> np.ndarray:
    """Rotate the heads of [B, T, H*D]."""
    return numpy_from_heads(numpy_rotate(numpy_to_heads(x, num_heads), cos, sin))


def numpy_rotated_heads(
    q: np.ndarray,
    k: np.ndarray | None,
    v: np.ndarray | None,
    cos: np.ndarray | None,
    sin: np.ndarray | None,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value as heads, rotated."""
    q, k, v = numpy_unpack(q, k, v, num_heads, num_kv_heads)
    query, key = numpy_to_heads(q, num_heads), numpy_to_heads(k, num_kv_heads)
    if cos is not None and sin is not None:
        query, key = numpy_rotate(query, cos, sin), numpy_rotate(key, cos, sin)
    return query, key, numpy_to_heads(v, num_kv_heads)


def standard_rotary(
    emit: Emitter,
    x: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    *,
    rows: int,
    num_heads: int,
    size: int,
) -> ir.Value:
    """Rotate x [1, T, H*D] in standard ops; the result keeps its heads apart: [1, T, H, D]."""
    pairs = last_dim(cos)
    heads = emit.one("Reshape", x, emit.ints(1, rows, num_heads, size), part="heads")
    sizes = [pairs, pairs, size - 2 * pairs]
    sizes = sizes if sizes[-1] else sizes[:2]
    first, second, *rest = emit.node(
        "Split", [heads, emit.ints(*sizes)], part="halves", num_outputs=len(sizes), axis=-1
    )
    cos, sin = (_column(emit, table, rows) for table in (cos, sin))
    turned_first = emit.one(
        "Sub", emit.one("Mul", first, cos), emit.one("Mul", second, sin), part="turned_first"
    )
    turned_second = emit.one(
        "Add", emit.one("Mul", second, cos), emit.one("Mul", first, sin), part="turned_second"
    )
    return emit.one("Concat", turned_first, turned_second, *rest, part="turned", axis=-1)


def _column(emit: Emitter, table: ir.Value, rows: int) -> ir.Value:
    """The first rows of a table, [1, T, 1, R]: made once per graph."""
    held, pairs = static_dims(table)

    def make(emit: Emitter) -> ir.Value:
        cut = table
        if held != rows:
            cut = emit.one("Slice", table, emit.ints(0), emit.ints(rows), emit.ints(0))
        return emit.one("Reshape", cut, emit.ints(1, rows, 1, pairs))

    return emit.shared(f"{table.name}_rows", make)


def contrib_rotary(
    emit: Emitter,
    x: ir.Value | None,
    cos: ir.Value | None,
    sin: ir.Value | None,
    *,
    num_heads: int,
    size: int,
) -> ir.Value:
    """Rotate x [B, T, H*D] with the fused op, row r by row r of the tables."""
    pairs = last_dim(cos)
    return emit.one(
        "RotaryEmbedding",
        x,
        emit.ints(0),  # the table row of the first row
        cos,
        sin,
        domain=MICROSOFT,
        interleaved=0,
        num_heads=num_heads,
        rotary_embedding_dim=0 if 2 * pairs == size else 2 * pairs,
        scale=1.0,
    )


def _contrib(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    x, cos, sin = node.inputs
    num_heads, width = attribute(node, "num_heads"), dims(x)[-1]
    assert isinstance(width, int)
    return [contrib_rotary(emit, x, cos, sin, num_heads=num_heads, size=width // num_heads)]


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    x, cos, sin = node.inputs
    assert x is not None
    assert cos is not None
    assert sin is not None
    batch, rows, width = static_dims(x)
    num_heads = attribute(node, "num_heads")
    size = width // num_heads
    turned = standard_rotary(emit, x, cos, sin, rows=rows, num_heads=num_heads, size=size)
    return [emit.one("Reshape", turned, emit.ints(batch, rows, width), part="rows")]


OP = Op(
    name="rotary",
    overload=torch.ops.edgevlm.rotary.default,
    numpy=numpy_rotary,
    lowerings={"contrib": _contrib, "standard": _standard},
)
