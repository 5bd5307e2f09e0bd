"""Rows of each picture by their numbers.

The dense form multiplies by ones and zeros in place of looking up. A product with one 1 among zeros
is exact for finite numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import Op, attribute, dims, torch_op
from edgevlm_export.ops.picking import Pictures, kept_size, looked_up


def _empty(x: Tensor, rows: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], rows.shape[1], x.shape[2])


@torch_op("take_rows", fake=_empty)
def take_rows(x: Tensor, rows: Tensor, dense: bool = False) -> Tensor:
    """Take rows [B, k], int64, of float32 x [B, N, C]: [B, k, C]; k may be 0.

    `dense` chooses the form without look-ups, whose N is a number and whose x is finite.
    """
    return torch.gather(x, 1, rows.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def numpy_take_rows(x: np.ndarray, rows: np.ndarray, dense: bool = False) -> np.ndarray:
    """Take picture by picture."""
    return np.stack([picture[numbers] for picture, numbers in zip(x, rows, strict=True)])


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    x, rows = node.inputs
    assert x is not None
    assert rows is not None
    batch, count = dims(rows)
    assert isinstance(count, int), f"{rows.name} has a dynamic number of rows"
    if attribute(node, "dense"):
        return [_dense(emit, x, rows, count)]
    if Pictures(batch=batch).is_one:
        # A size of 0 is otherwise a dimension that Reshape leaves as it is.
        empty = {} if count else {"allowzero": 1}
        numbers = emit.one("Reshape", rows, emit.ints(count), part="numbers", **empty)
        return [emit.one("Gather", x, numbers, axis=1)]
    num_rows = dims(x)[1]
    if isinstance(batch, int) and isinstance(num_rows, int):
        found = looked_up(emit, x, rows, batch, num_rows, count)
        return [emit.one("Reshape", found, emit.ints(batch, count, -1))]
    numbers = emit.one("Reshape", rows, emit.ints(kept_size(batch), count, 1), part="numbers")
    return [emit.one("GatherND", x, numbers, batch_dims=1)]


def _dense(emit: Emitter, x: ir.Value, rows: ir.Value, count: int) -> ir.Value:
    batch, num_rows, _ = dims(x)
    assert isinstance(num_rows, int), f"{x.name} has a dynamic number of rows"
    column = emit.one("Reshape", rows, emit.ints(kept_size(batch), count, 1), part="numbers")
    one_hot = emit.one("Equal", column, emit.constant(np.arange(num_rows)), part="places")
    one_hot = emit.one("Cast", one_hot, part="one_hot", to=ir.DataType.FLOAT)
    return emit.one("MatMul", one_hot, x)


OP = Op(
    name="take_rows",
    overload=torch.ops.edgevlm.take_rows.default,
    numpy=numpy_take_rows,
    lowerings={"standard": _standard},
)
