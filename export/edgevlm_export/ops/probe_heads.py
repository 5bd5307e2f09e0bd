"""How much a few probe queries attend to each key, head by head: what heads are compared by.

The sum over heads with weights of their own is what `probe_attention` gives.
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


def _empty(q: Tensor, k: Tensor, _weights: Tensor, num_heads: int, *_: object) -> Tensor:
    return q.new_empty(q.shape[0], num_heads, k.shape[1])


@torch_op("probe_heads", fake=_empty)
def probe_heads(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    rows: Tensor | None = None,
) -> Tensor:
    """Score the keys k [B, S, Hkv*D] under probes q [B, m, Hq*D]: [B, Hq, S].

    `weights` [B or 1, Hq or 1, m] are those of the sum over probes. With `rows` [m], int64, probe i
    sees the keys 0 .. rows[i] only, else all of them.
    """
    shares = probe_shares(q, k, num_heads, num_kv_heads, scale, rows)
    return (shares * weights.unsqueeze(-1)).sum(dim=2)


def numpy_probe_heads(
    q: np.ndarray,
    k: np.ndarray,
    weights: np.ndarray,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Add up probe by probe."""
    weights = np.broadcast_to(weights, (len(q), num_heads, q.shape[1]))
    out = np.zeros((len(q), num_heads, k.shape[1]), q.dtype)
    for place, shares in numpy_probe_shares(q, k, num_heads, num_kv_heads, scale, rows):
        picture, head, _ = place
        out[picture, head, : len(shares)] += weights[place] * shares
    return out


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    q, k, weights = tensors(node, 3)
    assert weights is not None
    pictures, probes, _ = dims(q)
    keys = dims(k)[1]
    batch, heads, _ = dims(weights)
    assert isinstance(heads, int)
    length = probes if isinstance(probes, int) else -1
    shape = emit.ints(kept_size(batch), heads, 1, length)
    lines = emit.one("Reshape", weights, shape, part="lines")
    # Lines of one head, or of one picture, are those of all.
    sums = emit.one("MatMul", lines, emit_probe_shares(emit, node), part="sums")
    shape = emit.ints(
        kept_size(pictures), attribute(node, "num_heads"), keys if isinstance(keys, int) else -1
    )
    return [emit.one("Reshape", sums, shape, part="keys")]


OP = Op(
    name="probe_heads",
    overload=torch.ops.edgevlm.probe_heads.default,
    numpy=numpy_probe_heads,
    lowerings={"standard": _standard},
)
