"""The rows with the largest scores, in the order they stand in, and the rows that are left.

The dense form is for processors that cannot sort. A row's rank is the number of rows before it by
score, found by comparing each row with each; a row is kept where its rank is below the count, and
the n-th kept row is the one with n - 1 kept rows in front of it. All of that is comparisons and
products with constants: N * N numbers, 1.3 MB for 576 rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import Op, attribute, dims, torch_op
from edgevlm_export.ops.picking import ascending, kept_size


def _empty(scores: Tensor, count: int, *_: object) -> tuple[Tensor, Tensor]:
    batch, rows = scores.shape
    kept = scores.new_empty(batch, count, dtype=torch.int64)
    return kept, scores.new_empty(batch, rows - count, dtype=torch.int64)


@torch_op("top_rows", fake=_empty)
def top_rows(scores: Tensor, count: int, dense: bool = False) -> tuple[Tensor, Tensor]:
    """Return (kept [B, count], rest [B, N - count]) of scores [B, N], int64, both ascending.

    0 <= count <= N. Of equal scores the lowest row is kept; infinities are scores like others, NaN
    is none. `dense` chooses the form without sorting, whose N is a number.
    """
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    kept, rest = order[:, :count], order[:, count:]
    return kept.sort(dim=1).values, rest.sort(dim=1).values


def numpy_top_rows(
    scores: np.ndarray, count: int, dense: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Take the best row that is left, again and again."""
    kept = np.zeros((len(scores), count), np.int64)
    rest = np.zeros((len(scores), scores.shape[1] - count), np.int64)
    for picture, row_scores in enumerate(scores):
        left = list(range(len(row_scores)))
        for _ in range(count):
            left.remove(max(left, key=lambda row: (row_scores[row], -row)))
        kept[picture] = [row for row in range(len(row_scores)) if row not in left]
        rest[picture] = left
    return kept, rest


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value | None]:
    (scores,) = node.inputs
    assert scores is not None
    _, rows = dims(scores)
    assert isinstance(rows, int), f"{scores.name} has a dynamic number of rows"
    count = attribute(node, "count")
    wanted = [bool(out.uses()) or out.is_graph_output() for out in node.outputs]
    if attribute(node, "dense"):
        return _dense(emit, scores, count, wanted)
    # Of equal numbers TopK gives the lower index.
    num_sorted = rows if wanted[1] else count
    _, order = emit.node("TopK", [scores, emit.ints(num_sorted)], part="order", num_outputs=2)
    if not wanted[1]:
        return [ascending(emit, order, count, "kept"), None]
    kept, rest = emit.node(
        "Split", [order, emit.ints(count, rows - count)], part="parts", num_outputs=2, axis=1
    )
    return [ascending(emit, kept, count, "kept"), ascending(emit, rest, rows - count, "rest")]


def _dense(
    emit: Emitter, scores: ir.Value, count: int, wanted: Sequence[bool]
) -> Sequence[ir.Value | None]:
    batch, rows = dims(scores)
    assert isinstance(rows, int)
    size = kept_size(batch)
    column = emit.one("Reshape", scores, emit.ints(size, rows, 1), part="column")
    line = emit.one("Reshape", scores, emit.ints(size, 1, rows), part="line")
    higher = emit.one("Greater", line, column, part="higher")
    in_front = emit.constant(np.tri(rows, k=-1, dtype=bool))
    tied = emit.one("And", emit.one("Equal", line, column), in_front, part="tied")
    before = emit.one("Or", higher, tied, part="before")
    flags = emit.one("Cast", before, part="before_flags", to=ir.DataType.FLOAT)
    rank = emit.one("MatMul", flags, emit.constant(np.ones((rows, 1), np.float32)), part="rank")
    rank = emit.one("Reshape", rank, emit.ints(size, rows), part="ranks")
    limit = emit.scalar(count, scores)
    is_kept = emit.one("Less", rank, limit) if wanted[0] else None
    is_rest = emit.one("GreaterOrEqual", rank, limit) if wanted[1] else None
    return [
        None if chosen is None else _marked(emit, chosen, size, rows, total, part)
        for chosen, total, part in ((is_kept, count, "kept"), (is_rest, rows - count, "rest"))
    ]


def _marked(
    emit: Emitter, chosen: ir.Value, size: int, rows: int, total: int, part: str
) -> ir.Value:
    """The `total` rows marked in bool [B, N], by a product with their numbers."""
    flags = emit.one("Cast", chosen, part=f"{part}_flags", to=ir.DataType.FLOAT)
    up_to = emit.constant(np.triu(np.ones((rows, rows), np.float32)))
    # 1 for the first chosen row, 2 for the second, and 0 for the others.
    number = emit.one("Mul", emit.one("MatMul", flags, up_to), flags, part=f"{part}_number")
    line = emit.one("Reshape", number, emit.ints(size, 1, rows), part=f"{part}_line")
    places = emit.constant(np.arange(1, total + 1, dtype=np.float32)[:, None])
    one_hot = emit.one("Equal", line, places, part=f"{part}_places")
    one_hot = emit.one("Cast", one_hot, part=f"{part}_one_hot", to=ir.DataType.FLOAT)
    # Whole numbers far below 2 ** 24: exact in float32.
    found = emit.one("MatMul", one_hot, emit.constant(np.arange(rows, dtype=np.float32)[:, None]))
    found = emit.one("Reshape", found, emit.ints(size, total), part=f"{part}_found")
    return emit.one("Cast", found, part=part, to=ir.DataType.INT64)


OP = Op(
    name="top_rows",
    overload=torch.ops.edgevlm.top_rows.default,
    numpy=numpy_top_rows,
    lowerings={"standard": _standard},
)
