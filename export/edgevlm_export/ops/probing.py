"""What the ops that probe attention share: the softmax shares of a few probe queries.

Only [H, m, S] numbers are ever there, whatever the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.heads import CLOSED, numpy_to_heads, to_heads
from edgevlm_export.ops.op import attribute, dims, tensors
from edgevlm_export.ops.picking import kept_size

# B batch, m probes, S keys, H heads (Hq query, Hkv key-value), D head size


def probe_shares(
    q: Tensor, k: Tensor, num_heads: int, num_kv_heads: int, scale: float, rows: Tensor | None
) -> Tensor:
    """What each probe of q [B, m, Hq*D] gives each key of k [B, S, Hkv*D]: [B, Hq, m, S].

    With `rows` [m], int64, probe i sees the keys 0 .. rows[i] only, else all of them.
    """
    query, key = to_heads(q, num_heads), to_heads(k, num_kv_heads)
    groups = num_heads // num_kv_heads
    scores = query @ key.repeat_interleave(groups, dim=1).mT * scale
    if rows is not None:
        hidden = torch.arange(k.shape[1]) > rows.unsqueeze(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1)


def numpy_probe_shares(
    q: np.ndarray,
    k: np.ndarray,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    rows: np.ndarray | None,
) -> Iterator[tuple[tuple[int, int, int], np.ndarray]]:
    """The shares of the keys that each probe sees, by (picture, head, probe)."""
    query, key = numpy_to_heads(q, num_heads), numpy_to_heads(k, num_kv_heads)
    for picture, head, probe in np.ndindex(*query.shape[:3]):
        end = k.shape[1] if rows is None else int(rows[probe]) + 1
        seen = key[picture, head // (num_heads // num_kv_heads), :end]
        scores = seen @ query[picture, head, probe] * scale
        shares = np.exp(scores - scores.max())
        yield (picture, head, probe), shares / shares.sum()


def emit_probe_shares(emit: Emitter, node: ir.Node) -> ir.Value:
    """The shares [B, Hq, m, S] of a node whose inputs are q, k, weights and rows."""
    q, k, _, rows = tensors(node, 4)
    assert q is not None
    assert k is not None
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
    return emit.one("Softmax", scores, axis=-1)


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
