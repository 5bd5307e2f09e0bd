"""How much a few probe queries attend to each key: what visual tokens are scored by.

Softmax is taken per head and probe, and what it gives is added up over both, with weights. Only
[H, m, S] numbers are ever there, whatever the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.heads import CLOSED, numpy_to_heads, to_heads
from edgevlm_export.ops.op import Op, attribute, dims, tensors, torch_op
from edgevlm_export.ops.picking import kept_size

# B batch, m probes, S keys, H heads (Hq query, Hkv key-value), D head size


def _empty(q: Tensor, k: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape[0], k.shape[1])


@torch_op("probe_attention", fake=_empty)
def probe_attention(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    rows: Tensor | None = None,
) -> Tensor:
    """Score the keys k [B, S, Hkv*D] under probes q [B, m, Hq*D]: [B, S].

    `weights` [B or 1, Hq or 1, m] are those of the sum. With `rows` [m], int64, probe i sees the
    keys 0 .. rows[i] only, else all of them.
    """
    query, key = to_heads(q, num_heads), to_heads(k, num_kv_heads)
    groups = num_heads // num_kv_heads
    scores = query @ key.repeat_interleave(groups, dim=1).mT * scale
    if rows is not None:
        hidden = torch.arange(k.shape[1]) > rows.unsqueeze(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return (torch.softmax(scores, dim=-1) * weights.unsqueeze(-1)).sum(dim=(1, 2))


def numpy_probe_attention(
    q: np.ndarray,
    k: np.ndarray,
    weights: np.ndarray,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Add up head by head and probe by probe."""
    query, key = numpy_to_heads(q, num_heads), numpy_to_heads(k, num_kv_heads)
    batch, _, probes, _ = query.shape
    weights = np.broadcast_to(weights, (batch, num_heads, probes))
    out = np.zeros((batch, k.shape[1]), q.dtype)
    for picture, head, probe in np.ndindex(batch, num_heads, probes):
        end = k.shape[1] if rows is None else int(rows[probe]) + 1
        seen = key[picture, head // (num_heads // num_kv_heads), :end]
        scores = seen @ query[picture, head, probe] * scale
        shares = np.exp(scores - scores.max())
        out[picture, :end] += weights[picture, head, probe] * shares / shares.sum()
    return out


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    q, k, weights, rows = tensors(node, 4)
    assert q is not None
    assert k is not None
    assert weights is not None
    num_heads, num_kv_heads = attribute(node, "num_heads"), attribute(node, "num_kv_heads")
    batch, probes, width = dims(q)
    keys = dims(k)[1]
    assert isinstance(width, int)
    size, pictures = width // num_heads, kept_size(batch)

    def heads(x: ir.Value, length: int | str, count: int, order: list[int], part: str) -> ir.Value:
        shape = emit.ints(pictures, kept_size(length), count, size)
        apart = emit.one("Reshape", x, shape, part=f"{part}_heads")
        return emit.one("Transpose", apart, part=part, perm=order)

    query = emit.one("Mul", q, emit.scalar(attribute(node, "scale"), q), part="scaled")
    query = heads(query, probes, num_heads, [0, 2, 1, 3], "query")
    key = heads(k, keys, num_kv_heads, [0, 2, 3, 1], "key")
    shared_rows = probes * (num_heads // num_kv_heads) if isinstance(probes, int) else -1
    if num_heads != num_kv_heads:
        # Heads that share keys lie below each other, and keys are never repeated.
        shape = emit.ints(pictures, num_kv_heads, shared_rows, size)
        query = emit.one("Reshape", query, shape, part="grouped")
    scores = emit.one("MatMul", query, key, part="scores")
    if num_heads != num_kv_heads:
        length = probes if isinstance(probes, int) else -1
        shape = emit.ints(pictures, num_heads, length, kept_size(keys))
        scores = emit.one("Reshape", scores, shape, part="ungrouped")
    if rows is not None:
        hidden = _hidden(emit, rows, k, probes)
        scores = emit.one("Add", scores, hidden, part="masked")
    shares = emit.one("Softmax", scores, axis=-1)
    length = num_heads * probes if isinstance(probes, int) else -1
    if isinstance(keys, int):
        shape = emit.ints(pictures, length, keys)
    else:
        count = emit.one("Shape", k, part="num_keys", start=1, end=2)
        shape = emit.one("Concat", emit.ints(pictures, length), count, part="shape", axis=0)
    shares = emit.one("Reshape", shares, shape, part="probe_rows")
    line = _line(emit, weights, num_heads, length)
    sums = emit.one("MatMul", line, shares, part="sums")
    shape = emit.ints(pictures, keys if isinstance(keys, int) else -1)
    return [emit.one("Reshape", sums, shape, part="keys")]


def _hidden(emit: Emitter, rows: ir.Value, k: ir.Value, probes: int | str) -> ir.Value:
    """An additive mask [m, S] that closes the keys behind each probe."""
    keys = dims(k)[1]
    if isinstance(keys, int):
        numbers = emit.constant(np.arange(keys))
    else:
        zero, one = (emit.constant(np.array(x, np.int64)) for x in (0, 1))
        count = emit.one("Squeeze", emit.one("Shape", k, part="num_keys", start=1, end=2))
        numbers = emit.one("Range", zero, count, one, part="numbers")
    shape = emit.ints(probes if isinstance(probes, int) else -1, 1)
    column = emit.one("Reshape", rows, shape, part="probe_column")
    behind = emit.one("Greater", numbers, column, part="behind")
    closed, opened = (emit.constant(np.array(x, np.float32)) for x in (CLOSED, 0))
    return emit.one("Where", behind, closed, opened, part="mask")


def _line(emit: Emitter, weights: ir.Value, num_heads: int, length: int) -> ir.Value:
    """Weights [B or 1, Hq or 1, m] as a line [B or 1, 1, Hq*m]."""
    batch, heads, _ = dims(weights)
    if heads != num_heads:
        weights = emit.one("Expand", weights, emit.ints(1, num_heads, 1), part="head_weights")
    return emit.one("Reshape", weights, emit.ints(kept_size(batch), 1, length), part="line")


OP = Op(
    name="probe_attention",
    overload=torch.ops.edgevlm.probe_attention.default,
    numpy=numpy_probe_attention,
    lowerings={"standard": _standard},
)
