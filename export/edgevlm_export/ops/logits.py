"""Scores of rows against every row of a table: x T^T, the head of a decoder.

Unlike `linear`, the weight keeps torch's layout [V, K]: it often is the embedding table, whose rows
the host gathers, and then one copy of the bytes serves both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import MICROSOFT, Op, static_dims, torch_op


@torch_op("logits", fake=lambda x, table: x.new_empty(*x.shape[:-1], table.shape[0]))
def logits(x: Tensor, table: Tensor) -> Tensor:
    """Map rows [B, R, K] to [B, R, V] with a table [V, K]."""
    return nn.functional.linear(x, table)


def numpy_logits(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Multiply by the transposed table."""
    out: np.ndarray = x @ table.T
    return out


def _contrib(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    return [emit.one("FusedMatMul", *node.inputs, domain=MICROSOFT, transA=0, transB=1, alpha=1.0)]


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    x, table = node.inputs
    batch, rows, width = static_dims(x)
    vocabulary = static_dims(table)[0]
    flat = emit.one("Reshape", x, emit.ints(batch * rows, width), part="flat")
    out = emit.one("Gemm", flat, table, alpha=1.0, beta=1.0, transA=0, transB=1)
    return [emit.one("Reshape", out, emit.ints(batch, rows, vocabulary), part="rows")]


OP = Op(
    name="logits",
    overload=torch.ops.edgevlm.logits.default,
    numpy=numpy_logits,
    lowerings={"contrib": _contrib, "standard": _standard},
)
