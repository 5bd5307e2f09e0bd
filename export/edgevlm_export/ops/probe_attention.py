"""How much a few probe queries attend to each key: what visual tokens are scored by.

Softmax is taken per head and probe, and what it gives is added up over both, with weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import Op, attribute, dims, tensors, torch_op
from edgevlm_export.ops.picking import kept_size
from edgevlm_export.ops.probing import emit_probe_shares, numpy_probe_shares, probe_shares

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
    shares = probe_shares(q, k, num_heads, num_kv_heads, scale, rows)
    return (shares * weights.unsqueeze(-1)).sum(dim=(1, 2))


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
    weights = np.broadcast_to(weights, (len(q), num_heads, q.shape[1]))
    out = np.zeros((len(q), k.shape[1]), q.dtype)
    for place, shares in numpy_probe_shares(q, k, num_heads, num_kv_heads, scale, rows):
        out[place[0], : len(shares)] += weights[place] * shares
    return out


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    q, k, weights = tensors(node, 3)
    assert k is not None
    assert weights is not None
    num_heads = attribute(node, "num_heads")
    batch, probes, _ = dims(q)
    keys, pictures = dims(k)[1], kept_size(batch)
    shares = emit_probe_shares(emit, node)
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
