"""A quantized cache in standard ops: pairs of QuantizeLinear and DequantizeLinear.

Where one scale is for all, the pair has it. Scales of channels differ along two axes of a cache
[1, Hkv, S, D], heads and features, and a pair has one: there the pair has the scale 1, rows are
divided before it, and what the scale multiplies is not the cache but the few rows that meet it:

    (q * k_scale) . codes^T  =  q . (codes * k_scale)^T
    (weights . codes) * v_scale  =  weights . (codes * v_scale)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgevlm_export.emit import Emitter
from edgevlm_export.errors import ExportError
from edgevlm_export.ops.grouped import Groups
from edgevlm_export.ops.kv_grid import FLOAT8


class KvPairs:
    """The keys, or the values, of one attention; without a `dtype` they stay as they are."""

    def __init__(self, emit: Emitter, scale: ir.Value | None, dtype: str, *, part: str) -> None:
        """Emit for this scale, a constant [1] or [Hkv, 1, D]; `part` is `key` or `value`."""
        if dtype == "int4":
            raise ExportError(
                f"{emit.site!r} has a cache of int4, standard ops pack no two numbers in a byte",
                role=emit.graph.name or "graph",
                op="masked_attention",
                hint="choose int8 or float8_e4m3fn, or a target with GroupQueryAttention",
            )
        self._emit, self._dtype, self._part = emit, dtype, part
        if scale is None:
            return
        assert scale.const_value is not None, f"{scale.name} is not a constant"
        factors = scale.const_value.numpy().astype(np.float32)
        self._channels = factors if factors.size > 1 else None
        step = np.float32(1.0) if factors.size > 1 else factors.reshape(())
        zero = np.zeros((), FLOAT8.get(dtype, np.int8))
        self._pair = emit.constant(np.asarray(step)), emit.constant(zero)

    def rounded(self, rows: ir.Value) -> ir.Value:
        """Rows [1, Hkv, T, D] as the cache keeps them."""
        if not self._dtype:
            return rows
        if self._channels is not None:
            steps = self._emit.constant(1 / self._channels)
            rows = self._emit.one("Mul", rows, steps, part=f"{self._part}_steps")
        return self._emit.one("QuantizeLinear", rows, *self._pair, part=f"{self._part}_codes")

    def restored(self, codes: ir.Value) -> ir.Value:
        """The numbers of codes; without the scales of channels, where there are such."""
        if not self._dtype:
            return codes
        return self._emit.one("DequantizeLinear", codes, *self._pair, part=f"{self._part}_numbers")

    def scaled_queries(self, scale: float, groups: Groups) -> ir.Value:
        """What queries [1, Hq, T, D] are multiplied by: the scale of scores, and of channels."""
        if not self._dtype or self._channels is None:
            return self._emit.constant(np.array(scale, dtype=np.float32))
        return self._emit.constant(scale * np.repeat(self._channels, groups.count, axis=0))

    def scaled_outputs(self, out: ir.Value) -> ir.Value:
        """Attention's output [1, Hkv, G*T, D] times the scales of channels."""
        if not self._dtype or self._channels is None:
            return out
        return self._emit.one("Mul", out, self._emit.constant(self._channels), part="scaled_values")
