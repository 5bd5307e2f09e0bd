"""The contrib form of attention over a quantized cache for calls of many rows, a prompt's.

GroupQueryAttention restores every number of a quantized cache anew for every row that meets it: a
first prompt of 256 rows takes 2.4 to 3.1 times as long with int8 as with float32, 4 to 6 times with
int4. Here what the call reads is restored once, into memory of the call, the kernel attends in
float32, and the new rows are scattered into the cache, which stays bound in place. The numbers are
the same; it costs float32 of the used slots of one layer, twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.heads import split_packed
from edgevlm_export.ops.kv_grid import LIMITS
from edgevlm_export.ops.op import MICROSOFT, attribute, tensors
from edgevlm_export.ops.rotary import contrib_rotary

# T rows of this call, U used slots before it, W bytes of a stored head (D of int8, D/2 of int4)

_NIBBLE = 16


def lower_prompt(emit: Emitter, node: ir.Node, size: int) -> Sequence[ir.Value]:
    """Round the new rows, restore the used slots, attend, and scatter; `size` is D."""
    q, k, v, past_key, past_value, seqlens_k, total, cos, sin, *scales = tensors(node, 11)
    num_heads, num_kv_heads = attribute(node, "num_heads"), attribute(node, "num_kv_heads")
    assert q is not None
    rows, last_slot = q, seqlens_k
    if k is None or v is None:
        q, k, v = split_packed(emit, q, num_heads, num_kv_heads)
    if cos is not None:
        q = contrib_rotary(emit, q, cos, sin, num_heads=num_heads, size=size)
        k = contrib_rotary(emit, k, cos, sin, num_heads=num_kv_heads, size=size)
    slots = emit.shared(
        f"{_group(last_slot)}new_slots_x{num_kv_heads}",
        lambda emit: new_slots(emit, used_slots(emit, rows, last_slot), rows, num_kv_heads),
    )
    # Asked of the rows of this layer, or the caches of all layers would be restored before any row
    # is there: they hang on nothing else.
    used = used_slots(emit, rows, last_slot)
    grids = [Grid(emit, scale, attribute(node, "kv_dtype"), num_kv_heads, size) for scale in scales]
    news, olds, presents = [], [], []
    for grid, new, past in zip(grids, (k, v), (past_key, past_value), strict=True):
        numbers, codes = grid.rounded(new)
        news.append(numbers)
        olds.append(grid.restored(emit.one("Slice", past, emit.ints(0), used, emit.ints(2))))
        presents.append(emit.one("ScatterND", past, slots, codes, part="present"))
    # Without its outputs of keys and values the kernel forgets the past, and gives wrong numbers.
    out, *extended = emit.node(
        "GroupQueryAttention",
        [q, *news, *olds, seqlens_k, total],
        domain=MICROSOFT,
        num_outputs=3,
        num_heads=num_heads,
        kv_num_heads=num_kv_heads,
        scale=attribute(node, "scale"),
        softcap=attribute(node, "softcap"),
        local_window_size=attribute(node, "window") or -1,
    )
    return [released(emit, out, extended, num_heads * size), *presents]


def released(emit: Emitter, out: ir.Value, extended: Sequence[ir.Value], width: int) -> ir.Value:
    """`out` [1, T, Hq*D] as it is, read after `extended`.

    ONNX Runtime keeps an output that nothing reads until the call ends: that would be the float32
    caches of all layers. So the batch axis of `out` is taken from them.
    """
    ones = (emit.one("Shape", x, part="batch", start=0, end=1) for x in extended)
    batch = emit.one("Mul", *ones, part="batches")
    shape = emit.one("Concat", batch, emit.ints(-1, width), part="rows_shape", axis=0)
    return emit.one("Reshape", out, shape, part="rows")


class Grid:
    """The nodes that round and restore the keys, or the values, of one attention."""

    def __init__(
        self, emit: Emitter, scale: ir.Value | None, dtype: str, num_kv_heads: int, size: int
    ) -> None:
        """Take the scale, a constant, for caches of so many heads of `size` numbers."""
        assert scale is not None
        assert scale.const_value is not None, f"{scale.name} is not a constant"
        self._emit, self._dtype, self._heads, self._size = emit, dtype, num_kv_heads, size
        self._scale = scale.const_value.numpy().astype(np.float32)
        self._is_whole = self._scale.size == 1

    def rounded(self, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Rows [1, T, Hkv*D] as numbers of the grid, and as codes [1, T, Hkv, W]."""
        emit, flat = self._emit, self._scale.reshape(() if self._is_whole else (-1,))
        steps = emit.one("Mul", rows, emit.constant(1 / flat), part="steps")
        if self._dtype == "int8":
            pair = emit.constant(np.array(1, np.float32)), emit.constant(np.array(0, np.int8))
            codes = emit.one("QuantizeLinear", steps, *pair)
            whole = emit.one("DequantizeLinear", codes, *pair)
        else:
            limits = (emit.constant(np.array(x, np.float32)) for x in LIMITS[self._dtype])
            whole = emit.one("Clip", emit.one("Round", steps), *limits)
            codes = self._packed(whole)
        numbers = emit.one("Mul", whole, emit.constant(flat), part="numbers")
        return numbers, emit.one("Reshape", codes, emit.ints(1, -1, self._heads, self._width))

    def restored(self, codes: ir.Value) -> ir.Value:
        """Codes [1, Hkv, U, W] as numbers [1, Hkv, U, D]."""
        emit, zero = self._emit, np.array(0, np.int8)
        if self._dtype == "int4":
            codes, zero = self._unpacked(codes), np.array(-LIMITS["int4"][0], np.uint8)
        step = self._scale.reshape(()) if self._is_whole else np.array(1, np.float32)
        numbers = emit.one("DequantizeLinear", codes, emit.constant(step), emit.constant(zero))
        if self._is_whole:
            return numbers
        return emit.one("Mul", numbers, emit.constant(self._scale), part="restored")

    @property
    def _width(self) -> int:
        return self._size // 2 if self._dtype == "int4" else self._size

    def _packed(self, codes: ir.Value) -> ir.Value:
        """Whole numbers -8 .. 7 in pairs, the even one in the lower half of a byte."""
        emit, low = self._emit, LIMITS["int4"][0]
        pairs = emit.one("Reshape", codes, emit.ints(1, -1, self._heads * self._width, 2))
        weights = emit.constant(np.array([1, _NIBBLE], np.float32))
        joined = emit.one("ReduceSum", emit.one("Mul", pairs, weights), emit.ints(3), keepdims=0)
        bias = emit.constant(np.array(-low * (1 + _NIBBLE), np.float32))
        biased = emit.one("Add", joined, bias, part="biased")
        return emit.one("Cast", biased, to=ir.DataType.UINT8)

    def _unpacked(self, codes: ir.Value) -> ir.Value:
        """Bytes [1, Hkv, U, D/2] as numbers 0 .. 15 [1, Hkv, U, D]."""
        emit = self._emit
        low = emit.one("BitwiseAnd", codes, emit.constant(np.array(_NIBBLE - 1, np.uint8)))
        shift = emit.constant(np.array(4, np.uint8))
        high = emit.one("BitShift", codes, shift, direction="RIGHT")
        last = emit.ints(-1)
        halves = (emit.one("Unsqueeze", half, last) for half in (low, high))
        pairs = emit.one("Concat", *halves, part="halves", axis=-1)
        return emit.one("Reshape", pairs, emit.ints(1, self._heads, -1, self._size))


def used_slots(emit: Emitter, rows: ir.Value, last_slot: ir.Value | None) -> ir.Value:
    """Slots used before this call, int64 [1]: one more than the last slot, less T."""
    end = emit.shared(f"{_group(last_slot)}total_slots", lambda emit: _total_slots(emit, last_slot))
    return emit.one("Sub", end, emit.one("Shape", rows, start=1, end=2))


def _group(last_slot: ir.Value | None) -> str:
    """What tells the rows of one state group from those of others, which are fewer or more."""
    assert last_slot is not None
    return f"{last_slot.name}_"


def _total_slots(emit: Emitter, last_slot: ir.Value | None) -> ir.Value:
    """Slots used after this call, int64 [1]."""
    return emit.one("Add", emit.one("Cast", last_slot, to=ir.DataType.INT64), emit.ints(1))


def new_slots(emit: Emitter, used: ir.Value, rows: ir.Value, num_kv_heads: int) -> ir.Value:
    """Where new rows [1, T, Hkv, W] lie in a cache [1, Hkv, C, W]: batch, head, slot of each."""
    count = emit.one("Shape", rows, start=1, end=2)
    scalar = [emit.one("Squeeze", x) for x in (used, emit.one("Add", used, count))]
    one = emit.constant(np.array(1, np.int64))
    numbers = emit.one("Range", *scalar, one)
    column = emit.one("Reshape", numbers, emit.ints(1, -1, 1, 1))
    places = np.zeros((1, 1, num_kv_heads, 3), np.int64)
    places[..., 1] = np.arange(num_kv_heads)
    # The slot is added to the last of the three: [0, head, 0] + slot * [0, 0, 1].
    slot = emit.one("Mul", column, emit.constant(np.array([0, 0, 1], np.int64)))
    return emit.one("Add", emit.constant(places), slot, part="places")
