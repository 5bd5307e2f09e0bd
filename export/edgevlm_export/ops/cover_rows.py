"""Rows that together cover the most: greedy facility location, for MMTok and CATP.

Each of R things is covered as well as its best picked row covers it. A step picks the row that adds
most: what it covers beyond the best so far, summed over the things, plus a bonus of its own.

The state is what each row would still add, left [N, R], and not the best so far b [R], because

    max(gains - max(b, gains[i]), 0)  =  max(left - left[i], 0)        left = max(gains - b, 0)

where all numbers are at least 0. A step is a look-up, a Sub, a Relu and a sum, whose terms are all
what it asks for: of 24 random cases of 576 rows and 640 things, all pick the rows that float64
picks. The sums of max(gains, b) rank the rows too, with one node less, but as small differences of
large sums: 4 of the cases pick others.

What bounds a step is memory: N * R numbers, 1.5 MB in the cases above, are read three times and
written twice, and do not fit a cache of 512 KiB per core. Two such cores take 0.13 ms, with max in
place of Sub and Relu no less, and with a product with ones in place of ReduceSum more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import Op, attribute, dims, tensors, torch_op
from edgevlm_export.ops.picking import LOWEST, Pictures


def _empty(gains: Tensor, _bonus: object, count: int) -> Tensor:
    return gains.new_empty(gains.shape[0], count, dtype=torch.int64)


@torch_op("cover_rows", fake=_empty)
def cover_rows(gains: Tensor, bonus: Tensor | None, count: int) -> Tensor:
    """Pick rows [B, count], int64, ascending, by gains [B, N, R] and bonus [B, N] or None.

    0 < count <= N. `gains[b, i, r]` is how well row i covers thing r; less than 0 counts as 0. No
    row is picked twice, and of equal sums the lowest row is picked. Engines add in different
    orders: rows whose sums differ by no more than rounding may be picked one for the other.
    """
    batch = torch.arange(gains.shape[0])
    extra = gains.new_zeros(gains.shape[:2]) if bonus is None else bonus.clone()
    left = torch.relu(gains)
    picked: list[Tensor] = []
    while len(picked) < count:
        if picked:
            left = left.sub(left[batch, picked[-1]].unsqueeze(1)).relu_()
        picked.append((left.sum(dim=2) + extra).argmax(dim=1))
        extra[batch, picked[-1]] = LOWEST
    return torch.stack(picked, dim=1).sort(dim=1).values


def numpy_cover_rows(gains: np.ndarray, bonus: np.ndarray | None, count: int) -> np.ndarray:
    """Add up what each row that is left adds, by the definition, in float64."""
    out = np.zeros((len(gains), count), np.int64)
    for picture, values in enumerate(gains.astype(np.float64)):
        extra = np.zeros(len(values)) if bonus is None else bonus[picture].astype(np.float64)
        best = np.zeros(values.shape[1])
        picked: list[int] = []
        for _ in range(count):
            left = [row for row in range(len(values)) if row not in picked]
            sums = [np.maximum(values[row] - best, 0).sum() + extra[row] for row in left]
            picked.append(left[int(np.argmax(sums))])
            best = np.maximum(best, values[picked[-1]])
        out[picture] = sorted(picked)
    return out


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    gains, bonus = tensors(node, 2)
    assert gains is not None
    batch, num_rows, things = dims(gains)
    assert isinstance(num_rows, int), f"{gains.name} has a dynamic number of rows"
    pictures = Pictures(batch=batch, num_rows=num_rows)
    numbers = emit.constant(np.arange(num_rows))
    lowest = emit.scalar(LOWEST, gains)
    extra = bonus if bonus is not None else emit.constant(np.zeros((1, num_rows), np.float32))
    left = gains
    if pictures.is_one:
        assert isinstance(things, int), f"{gains.name} has a dynamic number of things"
        left = emit.one("Reshape", gains, emit.ints(num_rows, things), part="picture")
    left = emit.one("Relu", left, part="left")
    picked: list[ir.Value] = []
    for step in range(attribute(node, "count")):
        if step:
            is_picked = emit.one("Equal", numbers, picked[-1], part="is_picked")
            extra = emit.one("Where", is_picked, lowest, extra, part="extra")
            covered = pictures.row(emit, left, picked[-1])
            if not pictures.is_one:
                covered = emit.one("Unsqueeze", covered, emit.ints(1), part="covered")
            beyond = emit.one("Sub", left, covered, part="beyond")
            left = emit.one("Relu", beyond, part="left")
        sums = emit.one("ReduceSum", left, emit.ints(-1), part="sums", keepdims=0)
        sums = emit.one("Add", sums, extra, part="totals")
        picked.append(pictures.best(emit, sums))
    return [pictures.rows(emit, picked)]


OP = Op(
    name="cover_rows",
    overload=torch.ops.edgevlm.cover_rows.default,
    numpy=numpy_cover_rows,
    lowerings={"standard": _standard},
)
