"""State: the tensors a decoder carries from call to call, and the one table of their kinds.

Tensors of a group that are alike (kind, dtype, shape) share one array with a leading axis, so that
committing a token is one assignment for all layers. A kind says what the graph reads, what it
writes, and how rows are committed and taken back:

    kind         the graph writes                    commit of n rows         going back
    kv_inplace   its rows into what it reads         nothing                  anywhere
    kv_delta     new rows [.., T, ..]                into the next slots      anywhere
    kv_window    new rows [.., T, ..]                into slots mod W         within the last call
    conv         old columns, then new [.., K-1+T]   K-1 columns from n on    within the last call
    ssm          the next state, beside this one     the two change places    behind the last call
    const        nothing                             nothing                  anywhere

Going back to length 0 is always possible. Slots are zero until written: a masked slot must hold
finite numbers. Rows of padding come last and are never committed. What a number of a quantized
cache stands for is the graph's affair: here its bytes are moved, whole rows at a time.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from edgevlm_runtime.engine import Array
from edgevlm_runtime.errors import BundleError, EngineError, ResourceError
from edgevlm_runtime.manifest import StateGroup, StateTensor, carrier

# N tensors of a block, T rows of a call, S slots, W slots of a window, K taps of a convolution


class Block(Protocol):
    """Like tensors of one group, in arrays with a leading axis N.

    `used` is always the number of rows of the group before the call, or to go back to. A block that
    remembers no earlier row can still go back to 0.
    """

    tensors: tuple[StateTensor, ...]

    def reads(self) -> Array:
        """What the graph reads now."""
        ...

    def writes(self, num_rows: int) -> Array | None:
        """The array for what the graph writes in a call of T rows; None where it writes nothing."""
        ...

    def commit(self, written: Array | None, used: int, num_rows: int) -> None:
        """Take over the first rows of a call, out of what `writes` has given for it."""
        ...

    def remembers(self, used: int) -> bool:
        """Whether it can go back to `used` rows, more than none."""
        ...

    def rewind(self, used: int) -> None:
        """Go back to `used` rows that it remembers, or to none."""
        ...

    def fork(self, used: int) -> Block:
        """An independent copy in the same state."""
        ...


class CacheBlock:
    """`kv_inplace` and `kv_delta`: slots in order. What lies beyond the used ones is never read.

    A graph writes its new rows into the cache that it reads, or returns them for the next slots.
    """

    def __init__(self, tensors: tuple[StateTensor, ...]) -> None:
        """Start with empty slots."""
        self.tensors = tensors
        self._array = _zeros(tensors)

    def reads(self) -> Array:
        """The cache."""
        return self._array

    def writes(self, num_rows: int) -> Array | None:
        """The cache, too, or T new rows."""
        inplace = self.tensors[0].kind == "kv_inplace"
        return self._array if inplace else _zeros(self.tensors, num_rows)

    def commit(self, written: Array | None, used: int, num_rows: int) -> None:
        """Copy the rows that the graph has not put there itself."""
        if written is not None and written is not self._array:
            rows = written[_slots(self.tensors, slice(num_rows))]
            self._array[_slots(self.tensors, slice(used, used + num_rows))] = rows

    def remembers(self, used: int) -> bool:
        """Any length."""
        return True

    def rewind(self, used: int) -> None:
        """Nothing is to be done."""

    def fork(self, used: int) -> CacheBlock:
        """Copy the used slots; the others stay memory that nobody has touched."""
        forked = CacheBlock(self.tensors)
        slots = _slots(self.tensors, slice(used))
        forked._array[slots] = self._array[slots]
        return forked


class WindowBlock:
    """`kv_window`: a ring of W slots, row r in slot r mod W; overwritten rows are kept one call."""

    def __init__(self, tensors: tuple[StateTensor, ...]) -> None:
        """Start with an empty ring."""
        self.tensors = tensors
        self._array = _zeros(tensors)
        self._window = tensors[0].shape[tensors[0].axis]
        self._first, self._end = 0, 0
        self._overwritten = self._array[:0]

    def reads(self) -> Array:
        """The ring."""
        return self._array

    def writes(self, num_rows: int) -> Array | None:
        """T new rows."""
        return _zeros(self.tensors, num_rows)

    def commit(self, written: Array | None, used: int, num_rows: int) -> None:
        """Put the rows into the ring; of more than W rows only the last W are of use."""
        assert written is not None, "new rows are written"
        self._end = used + num_rows
        self._first = max(used, self._end - self._window)
        slots = self._slots_of(self._first, self._end)
        self._overwritten = self._array[slots]
        self._array[slots] = written[_slots(self.tensors, slice(self._first - used, num_rows))]

    def remembers(self, used: int) -> bool:
        """Rows of the last call."""
        return self._first <= used <= self._end

    def rewind(self, used: int) -> None:
        """Put back what the last call has overwritten from row `used` on."""
        if used:
            kept = slice(used - self._first, self._end - self._first)
            slots = self._slots_of(used, self._end)
            self._array[slots] = self._overwritten[_slots(self.tensors, kept)]
        self._end = used

    def fork(self, used: int) -> WindowBlock:
        """Copy everything."""
        return copy.deepcopy(self)

    def _slots_of(self, first: int, end: int) -> tuple[slice | Array, ...]:
        return _slots(self.tensors, np.arange(first, end) % self._window)


class ConvBlock:
    """`conv`: the last K - 1 columns; the graph returns these and the new ones after them."""

    def __init__(self, tensors: tuple[StateTensor, ...]) -> None:
        """Start with columns of zeros."""
        self.tensors = tensors
        self._array = _zeros(tensors)
        self._num_columns = tensors[0].shape[tensors[0].axis]
        self._first, self._end = 0, 0
        self._wide = self._array

    def reads(self) -> Array:
        """The columns."""
        return self._array

    def writes(self, num_rows: int) -> Array | None:
        """K - 1 + T columns."""
        return _zeros(self.tensors, self._num_columns + num_rows)

    def commit(self, written: Array | None, used: int, num_rows: int) -> None:
        """Keep the columns that end with the last committed row."""
        assert written is not None, "columns are written"
        self._first, self._end, self._wide = used, used + num_rows, written
        self._keep(num_rows)

    def remembers(self, used: int) -> bool:
        """Rows of the last call."""
        return self._first <= used <= self._end

    def rewind(self, used: int) -> None:
        """Keep the columns that end with an earlier row of the last call."""
        if used:
            self._keep(used - self._first)
        else:
            self._array[...] = 0
            self._first = 0
        self._end = used

    def fork(self, used: int) -> ConvBlock:
        """Copy everything."""
        return copy.deepcopy(self)

    def _keep(self, num_rows: int) -> None:
        columns = slice(num_rows, num_rows + self._num_columns)
        self._array[...] = self._wide[_slots(self.tensors, columns)]


class RecurrentBlock:
    """`ssm`: two copies that take turns, the one before the last call and the one after it."""

    def __init__(self, tensors: tuple[StateTensor, ...]) -> None:
        """Start with zeros."""
        self.tensors = tensors
        self._pair = (_zeros(tensors), _zeros(tensors))
        self._first, self._end = 0, 0
        self.turn = 0

    def reads(self) -> Array:
        """The state."""
        return self._pair[self.turn]

    def writes(self, num_rows: int) -> Array | None:
        """The other copy."""
        return self._pair[1 - self.turn]

    def commit(self, written: Array | None, used: int, num_rows: int) -> None:
        """Change places."""
        self.turn = 1 - self.turn
        self._first, self._end = used, used + num_rows

    def remembers(self, used: int) -> bool:
        """The two ends of the last call."""
        return used in (self._first, self._end)

    def rewind(self, used: int) -> None:
        """Change places back."""
        if used == 0:
            self._pair[self.turn][...] = 0
        elif used < self._end:
            self.turn = 1 - self.turn
        self._first = self._end = used

    def fork(self, used: int) -> RecurrentBlock:
        """Copy everything."""
        return copy.deepcopy(self)


class ConstBlock:
    """`const`: memory that the prompt brings, read by every call."""

    def __init__(self, tensors: tuple[StateTensor, ...]) -> None:
        """Start with zeros."""
        self.tensors = tensors
        self._array = _zeros(tensors)

    def reads(self) -> Array:
        """The memory."""
        return self._array

    def writes(self, num_rows: int) -> Array | None:
        """Nothing."""
        return None

    def commit(self, written: Array | None, used: int, num_rows: int) -> None:
        """Nothing was written."""

    def remembers(self, used: int) -> bool:
        """Any length."""
        return True

    def rewind(self, used: int) -> None:
        """It does not change."""

    def fork(self, used: int) -> ConstBlock:
        """Copy it: a prompt of the copy may bring another memory."""
        return copy.deepcopy(self)

    def set(self, values: Mapping[str, Array]) -> None:
        """Take the named outputs of graphs that ran before."""
        for tensor, array in zip(self.tensors, self._array, strict=True):
            value = values.get(tensor.output)
            if value is None:
                continue
            if value.shape != array.shape:
                raise EngineError(
                    f"state {tensor.name!r} has shape {list(array.shape)}, output "
                    f"{tensor.output!r} gave {list(value.shape)}",
                    hint="compile the bundle again",
                )
            array[...] = value


KINDS: Mapping[str, Callable[[tuple[StateTensor, ...]], Block]] = {
    "kv_inplace": CacheBlock,
    "kv_delta": CacheBlock,
    "kv_window": WindowBlock,
    "conv": ConvBlock,
    "ssm": RecurrentBlock,
    "const": ConstBlock,
}
# Kinds whose slots run out.
LIMITED = ("kv_inplace", "kv_delta")


def open_blocks(group: StateGroup) -> list[Block]:
    """Allocate the tensors of a group, alike ones together."""
    alike: dict[tuple[object, ...], list[StateTensor]] = {}
    for tensor in group.tensors:
        if tensor.kind not in KINDS:
            raise BundleError(
                f"state {tensor.name!r} is of kind {tensor.kind!r}, this runtime has "
                f"{', '.join(map(repr, KINDS))}",
                hint="upgrade edgevlm-runtime",
            )
        key = (tensor.kind, tensor.dtype, tensor.shape, tensor.axis)
        alike.setdefault(key, []).append(tensor)
    return [KINDS[tensors[0].kind](tuple(tensors)) for tensors in alike.values()]


def check_memory(groups: Sequence[StateGroup]) -> None:
    """Refuse state that this machine has no memory for, before any of it is allocated."""
    needed = sum(group.nbytes for group in groups)
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise ResourceError(
            f"the decoder's state needs {needed >> 20} MiB, this machine has {present >> 20} MiB",
            hint="compile with a smaller context",
        )


def _zeros(tensors: tuple[StateTensor, ...], length: int | None = None) -> Array:
    """Zeros [N, *shape], with another length along the slot axis where one is given."""
    shape = list(tensors[0].shape)
    if length is not None:
        shape[tensors[0].axis] = length
    return np.zeros((len(tensors), *shape), carrier(tensors[0].dtype))


def _slots(tensors: tuple[StateTensor, ...], slots: slice | Array) -> tuple[slice | Array, ...]:
    """Index of these slots of all tensors."""
    return (*(slice(None),) * (tensors[0].axis + 1), slots)
