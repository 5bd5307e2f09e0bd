"""Grouped-query attention in standard ops: heads that share keys lie below each other.

The G = Hq / Hkv query heads of one key-value head are G*T rows of one matrix, so that keys and
values are multiplied where they lie and never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import static_dims


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """The sizes of one call: B, T, Hq, Hkv and D."""

    batch: int
    rows: int
    num_heads: int
    num_kv_heads: int
    size: int

    @property
    def count(self) -> int:
        """Query heads of one key-value head."""
        return self.num_heads // self.num_kv_heads

    def heads(self, emit: Emitter, query: ir.Value, scale: ir.Value) -> ir.Value:
        """Scale [B, Hq, T, D] and bring it to [B, Hkv, G*T, D]."""
        query = emit.one("Mul", query, scale, part="scaled")
        if self.count == 1:
            return query
        shape = emit.ints(self.batch, self.num_kv_heads, self.count * self.rows, self.size)
        return emit.one("Reshape", query, shape, part="grouped")

    def mask(self, emit: Emitter, mask: ir.Value) -> ir.Value:
        """Bring a mask [B or 1, Hq or 1, T, S] to [B or 1, Hkv or 1, G*T, S]."""
        if self.count == 1:
            return mask
        batch, num_heads, rows, keys = static_dims(mask)
        if num_heads == 1:
            copies, name = [mask] * self.count, f"{mask.name}_x{self.count}"
            return emit.shared(name, lambda emit: emit.one("Concat", *copies, axis=2))
        shape = emit.ints(batch, self.num_kv_heads, self.count * rows, keys)
        return emit.one("Reshape", mask, shape, part="grouped_mask")

    def rows_of(self, emit: Emitter, out: ir.Value) -> ir.Value:
        """Bring [B, Hkv, G*T, D] to [B, T, Hq*D]."""
        if self.count > 1:
            shape = emit.ints(self.batch, self.num_heads, self.rows, self.size)
            out = emit.one("Reshape", out, shape, part="ungrouped")
        out = emit.one("Transpose", out, part="rows_first", perm=[0, 2, 1, 3])
        width = self.num_heads * self.size
        return emit.one("Reshape", out, emit.ints(self.batch, self.rows, width), part="rows")
