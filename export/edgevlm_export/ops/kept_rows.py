"""The rows of a sequence that stay when of each block of visual tokens only some do.

A block's rows stand between rows of text, at a start of its own. In front of row r of what stays,
rows have been left out: as many as the gaps that lie before r say. The standard form adds up those
gaps with comparisons and a product; the contrib form marks the rows and asks which are marked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import Op, attribute, static_dims, torch_op

# P blocks, k rows of each that stay, T rows of the sequence, L rows that stay of it


def _empty(chosen: Tensor, starts: Tensor, x: Tensor, tokens: int) -> Tensor:
    blocks, kept = chosen.shape
    # With max, torch.export sees that the size is never below 0, and does not ask T to promise it.
    return starts.new_empty(torch.sym_max(0, x.shape[1] - blocks * (tokens - kept)))


@torch_op("kept_rows", fake=_empty)
def kept_rows(chosen: Tensor, starts: Tensor, x: Tensor, tokens: int) -> Tensor:
    """Number the rows that stay of a sequence x [1, T, W]: [T - P * (tokens - k)], int64.

    Blocks of `tokens` rows begin at `starts` [P], ascending, and do not overlap. Of block p the
    rows starts[p] + chosen[p] stay, ascending `chosen` [P, k] of 0 .. tokens - 1, k may be 0. All
    rows outside of blocks stay.
    """
    stays = torch.ones(x.shape[1], dtype=torch.bool)
    first = starts.unsqueeze(1)
    stays[first + torch.arange(tokens)] = False
    stays[first + chosen] = True
    return stays.nonzero().flatten()


def numpy_kept_rows(
    chosen: np.ndarray, starts: np.ndarray, x: np.ndarray, tokens: int
) -> np.ndarray:
    """Walk along the sequence."""
    kept: list[int] = []
    row = 0
    while row < x.shape[1]:
        if row in starts:
            kept += [row + int(place) for place in chosen[list(starts).index(row)]]
            row += tokens
        else:
            kept.append(row)
            row += 1
    return np.array(kept, np.int64)


def _contrib(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    chosen, starts, x = node.inputs
    tokens = attribute(node, "tokens")
    assert chosen is not None
    assert chosen.shape is not None
    # A mask [T, 1], so that what is scattered has the shape of where it goes.
    first = emit.one("Unsqueeze", starts, emit.ints(1, 2), part="first")
    block = emit.one("Add", first, emit.constant(np.arange(tokens)[:, None]), part="block")
    size = emit.one("Concat", emit.one("Shape", x, start=1, end=2), emit.ints(1), axis=0)
    stays = emit.one("Expand", emit.ints(1), size, part="all")
    left_out = emit.one("Mul", block, emit.ints(0), part="left_out")
    stays = emit.one("ScatterND", stays, block, left_out, part="outside")
    if chosen.shape[1] != 0:
        rows = emit.one("Unsqueeze", chosen, emit.ints(2), part="chosen")
        rows = emit.one("Add", first, rows, part="inside")
        marks = emit.one("Add", rows, emit.ints(1), part="marks")  # any number but 0
        stays = emit.one("ScatterND", stays, rows, marks, part="stays")
    found = emit.one("NonZero", stays, part="found")
    return [emit.one("Gather", found, emit.constant(np.array(0, np.int64)), axis=0)]


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    chosen, starts, x = node.inputs
    tokens = attribute(node, "tokens")
    assert chosen is not None
    blocks, count = static_dims(chosen)
    num_left = static_dims(x)[1] - blocks * (tokens - count)

    def number(value: int) -> ir.Value:
        return emit.constant(np.full((blocks, 1), value, np.float32))

    # Row numbers are exact in float32. Gap j of a block lies in front of its kept row j, the last
    # one behind them all.
    begins, ends = number(0), number(tokens)
    if count:
        places = emit.one("Cast", chosen, part="places", to=ir.DataType.FLOAT)
        behind = emit.one("Add", places, emit.constant(np.array(1, np.float32)), part="behind")
        begins = emit.one("Concat", begins, behind, part="begins", axis=1)
        ends = emit.one("Concat", places, ends, part="ends", axis=1)
    gaps = emit.one("Sub", ends, begins, part="gaps")
    gaps = emit.one("Reshape", gaps, emit.ints(blocks * (count + 1), 1), part="gap_column")
    first = emit.one("Cast", starts, part="first", to=ir.DataType.FLOAT)
    first = emit.one("Reshape", first, emit.ints(blocks, 1), part="first_column")
    # Where gap j of block p stands among the rows that stay.
    shift = np.arange(count + 1) - np.arange(blocks)[:, None] * (tokens - count)
    stand = emit.one("Add", first, emit.constant(shift.astype(np.float32)), part="stand")
    stand = emit.one("Reshape", stand, emit.ints(1, blocks * (count + 1)), part="stand_line")
    rows = emit.constant(np.arange(num_left, dtype=np.float32)[:, None])
    passed = emit.one("GreaterOrEqual", rows, stand, part="passed")
    passed = emit.one("Cast", passed, part="passed_flags", to=ir.DataType.FLOAT)
    kept = emit.one("Add", emit.one("MatMul", passed, gaps, part="left_out"), rows, part="kept")
    kept = emit.one("Reshape", kept, emit.ints(num_left), part="kept_line")
    return [emit.one("Cast", kept, part="numbers", to=ir.DataType.INT64)]


OP = Op(
    name="kept_rows",
    overload=torch.ops.edgevlm.kept_rows.default,
    numpy=numpy_kept_rows,
    lowerings={"contrib": _contrib, "standard": _standard},
)
