"""Rows that lie far from each other: greedy max-min, which DivPrune keeps visual tokens by.

The first row is the one whose nearest other row is farthest; each next one is the row with the
largest distance to its nearest picked row. A step reads one row of distances, so that the loop,
unrolled, costs three small nodes a row. A picked row has the lowest distance of all to itself and
drops out by that.

Paper: DivPrune, Alvar et al. 2025, https://arxiv.org/abs/2503.02175
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import Op, attribute, dims, torch_op
from edgevlm_export.ops.picking import LOWEST, Pictures


def _empty(distance: Tensor, count: int) -> Tensor:
    return distance.new_empty(distance.shape[0], count, dtype=torch.int64)


@torch_op("spread_rows", fake=_empty)
def spread_rows(distance: Tensor, count: int) -> Tensor:
    """Pick rows [B, count], int64, ascending, by distances [B, N, N] that are finite.

    0 < count <= N. `distance[b, i, j]` is how far j is from i once i is picked; the diagonal is not
    looked at. No row is picked twice, and of equal distances the lowest row is picked.
    """
    batch = torch.arange(distance.shape[0])
    same = torch.eye(distance.shape[1], dtype=torch.bool)
    nearest = distance.masked_fill(same, torch.inf).amin(dim=1)
    distance = distance.masked_fill(same, -torch.inf)
    picked = [nearest.argmax(dim=1)]
    nearest = distance[batch, picked[0]]
    while len(picked) < count:
        picked.append(nearest.argmax(dim=1))
        nearest = torch.minimum(nearest, distance[batch, picked[-1]])
    return torch.stack(picked, dim=1).sort(dim=1).values


def numpy_spread_rows(distance: np.ndarray, count: int) -> np.ndarray:
    """Look at every row that is left in every step."""
    rows = range(distance.shape[1])
    out = np.zeros((len(distance), count), np.int64)
    for picture, apart in enumerate(distance):
        picked: list[int] = []
        for _ in range(count):
            left = [row for row in rows if row not in picked]
            nearest = [
                min((apart[i, row] for i in picked or rows if i != row), default=0.0)
                for row in left
            ]
            picked.append(left[nearest.index(max(nearest))])
        out[picture] = sorted(picked)
    return out


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    (distance,) = node.inputs
    assert distance is not None
    batch, num_rows, _ = dims(distance)
    assert isinstance(num_rows, int), f"{distance.name} has a dynamic number of rows"
    pictures = Pictures(batch=batch, num_rows=num_rows)
    same = emit.constant(np.eye(num_rows, dtype=bool))
    others = emit.one("Where", same, emit.scalar(-LOWEST, distance), distance, part="others")
    nearest = emit.one("ReduceMin", others, emit.ints(1), part="nearest_other", keepdims=0)
    picked = [pictures.best(emit, nearest)]
    distance = emit.one("Where", same, emit.scalar(LOWEST, distance), distance, part="distances")
    if pictures.is_one:
        distance = emit.one("Reshape", distance, emit.ints(num_rows, num_rows), part="picture")
    nearest = pictures.row(emit, distance, picked[0])
    for step in range(1, attribute(node, "count")):
        if step > 1:
            row = pictures.row(emit, distance, picked[-1])
            nearest = emit.one("Min", nearest, row, part="nearest")
        picked.append(pictures.best(emit, nearest))
    return [pictures.rows(emit, picked)]


OP = Op(
    name="spread_rows",
    overload=torch.ops.edgevlm.spread_rows.default,
    numpy=numpy_spread_rows,
    lowerings={"standard": _standard},
)
