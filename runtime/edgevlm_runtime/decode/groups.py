"""A state group in use: its blocks, and how many of its slots are used.

The length of a decoder counts rows consumed. A group has used as many slots, less the rows that
graphs dropped before they reached the group's layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgevlm_runtime.engine import Array
from edgevlm_runtime.errors import BundleError, EngineError
from edgevlm_runtime.manifest import StateGroup
from edgevlm_runtime.state import LIMITED, Block, open_blocks


class Group:
    """The tensors of a state group; `used` of its slots are used."""

    def __init__(self, spec: StateGroup, blocks: list[Block] | None = None) -> None:
        """Allocate the tensors, unless they are given."""
        kinds = {tensor.kind for tensor in spec.tensors}
        if "kv_window" in kinds and kinds & set(LIMITED):
            raise BundleError(
                f"state group {spec.name!r} mixes 'kv_window' with {sorted(kinds & set(LIMITED))}",
                hint="compile the bundle again, with windows in a group of their own",
            )
        self.name = spec.name
        self.capacity = spec.capacity
        self.used = 0
        self.windowed = "kv_window" in kinds
        self.limited = bool(kinds & set(LIMITED))
        self.inplace = "kv_inplace" in kinds
        self.blocks = open_blocks(spec) if blocks is None else blocks
        self._spec = spec
        # Calls that dropped rows: the lengths before and after, and how many.
        self._drops: list[tuple[int, int, int]] = []

    def commit(
        self, written: Sequence[Array | None], length: int, num_rows: int, dropped: int
    ) -> None:
        """Take over a call of `num_rows` rows at a length; `written` has one array per block."""
        for block, array in zip(self.blocks, written, strict=True):
            block.commit(array, self.used, num_rows - dropped)
        self.used += num_rows - dropped
        if dropped:
            self._drops.append((length, length + num_rows, dropped))

    def check_rewind(self, length: int) -> None:
        """Raise EngineError where a tensor does not remember that length."""
        used = self._used_at(length)
        for block in self.blocks:
            if used and not block.remembers(used):
                tensor = block.tensors[0]
                raise EngineError(
                    f"state {tensor.name!r} of kind {tensor.kind!r} cannot go back to row {length}",
                    hint="rewind within the last call, or to 0 and prefill again",
                )

    def rewind(self, length: int) -> None:
        """Forget all rows from `length` on."""
        self.used = self._used_at(length)
        for block in self.blocks:
            block.rewind(self.used)
        self._drops = [drop for drop in self._drops if drop[1] <= length]

    def fork(self) -> Group:
        """An independent copy."""
        copy = Group(self._spec, [block.fork(self.used) for block in self.blocks])
        copy.used, copy._drops = self.used, list(self._drops)
        return copy

    def _used_at(self, length: int) -> int:
        """The slots that were used at a length, which must not lie inside a call that dropped."""
        for begin, end, _ in self._drops:
            if begin < length < end:
                raise EngineError(
                    f"group {self.name!r} cannot go back to row {length}: the call of rows {begin} "
                    f"to {end - 1} has dropped some",
                    hint=f"rewind to {begin} or less",
                )
        return length - sum(dropped for _, end, dropped in self._drops if end <= length)
