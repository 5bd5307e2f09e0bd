"""What the ops that pick rows share: ascending order, and one picture or a batch of them.

Every tie goes to the lowest row, in every engine. NaN has no place among scores: no op looks for
it, and what it leads to is not defined.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgevlm_export.emit import Emitter

LOWEST = float(np.finfo(np.float32).min)
"""Below every score. Finite, as constants of a graph are; it is compared, never added up."""


def ascending(emit: Emitter, rows: ir.Value, count: int, part: str = "ascending") -> ir.Value:
    """Rows [B, count], no row twice, from the lowest to the highest."""
    if count < 2:
        return rows
    inputs = [rows, emit.ints(count)]
    return emit.node("TopK", inputs, part=part, num_outputs=2, axis=-1, largest=0)[0]


def looked_up(
    emit: Emitter, x: ir.Value, rows: ir.Value, batch: int, num_rows: int, count: int = 1
) -> ir.Value:
    """Rows [B, k] of x [B, N, W], one below the other: [B * k, W]."""
    first = emit.constant(num_rows * np.arange(batch)[:, None])
    numbers = emit.one("Add", rows, first, part="numbers")
    numbers = emit.one("Reshape", numbers, emit.ints(batch * count), part="number_line")
    together = emit.one("Reshape", x, emit.ints(batch * num_rows, -1), part="together")
    return emit.one("Gather", together, numbers, part="row", axis=0)


def kept_size(size: int | str) -> int:
    """A dimension as Reshape takes it where it stays in place: 0 keeps a dynamic one."""
    return size if isinstance(size, int) else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """How rows are looked up in a batch of pictures [B, N, W].

    Few NPU compilers take GatherND. One picture needs none: an index is [1], of several [B, 1]. Of
    a fixed number of pictures, of `num_rows` each, the rows lie below each other.
    """

    batch: int | str
    num_rows: int | None = None

    @property
    def is_one(self) -> bool:
        """Whether the batch is known to be one picture."""
        return self.batch == 1

    def best(self, emit: Emitter, scores: ir.Value) -> ir.Value:
        """The index of the largest of scores [B, N], the first of equal ones."""
        return emit.one("ArgMax", scores, part="best", axis=1, keepdims=0 if self.is_one else 1)

    def row(self, emit: Emitter, x: ir.Value, index: ir.Value) -> ir.Value:
        """The row at an index, [1, W] of x [N, W] where the picture is one, else [B, W]."""
        if self.is_one:
            return emit.one("Gather", x, index, part="row", axis=0)
        if isinstance(self.batch, int) and self.num_rows is not None:
            return looked_up(emit, x, index, self.batch, self.num_rows)
        return emit.one("GatherND", x, index, part="row", batch_dims=1)

    def rows(self, emit: Emitter, picked: list[ir.Value]) -> ir.Value:
        """The indices picked one by one as rows [B, count], ascending."""
        count = len(picked)
        together = picked[0]
        if count > 1:
            together = emit.one("Concat", *picked, part="picked", axis=-1)
        if self.is_one:
            together = emit.one("Reshape", together, emit.ints(1, count), part="picture")
        return ascending(emit, together, count)
