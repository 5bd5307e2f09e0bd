"""The decoder: step graphs of a bundle with their state, for every form of graph.

Graphs differ in rows (any number, or a fixed one with padding), in what they write (their cache in
place, or new rows to commit) and in phase. All of that is data in the manifest: a call takes the
graph that its phase and number of rows ask for, and all graphs share the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode.feeds import CallRows
from edgevlm_runtime.decode.groups import Group
from edgevlm_runtime.decode.protocol import Cancelled, Prompt, Step
from edgevlm_runtime.decode.schedule import Calls, Schedule
from edgevlm_runtime.decode.step_graph import KEPT_ROWS, BoundStep, Sizes, StepGraph
from edgevlm_runtime.engine import Array, Engines
from edgevlm_runtime.engines.table import EmbeddingTable
from edgevlm_runtime.errors import BundleError, EngineError, InputError
from edgevlm_runtime.manifest import GraphSpec, StateGroup
from edgevlm_runtime.rotary import RotaryTable
from edgevlm_runtime.state import ConstBlock, RecurrentBlock, check_memory

# T rows of a call, W width, axes: numbers per position


def open_decoder(
    bundle: Bundle, engines: Engines, table: EmbeddingTable, role: str = "step"
) -> StepDecoder:
    """A decoder over the graphs of a role; they are loaded when they are first called."""
    variant = bundle.variant
    graphs = [graph for graph in variant.graphs if graph.role == role]
    if not graphs:
        raise BundleError(
            f"variant {bundle.variant_name!r} has no graph of role {role!r}",
            hint=f"it has {', '.join(sorted({repr(graph.role) for graph in variant.graphs}))}",
        )
    sources = {tensor.source for graph in graphs for tensor in graph.inputs}
    specs = [
        group
        for group in variant.state
        if any(f"state:{tensor.name}" in sources for tensor in group.tensors)
    ]
    _check_state(graphs, specs)
    check_memory(specs)
    state_outputs = {tensor.output for group in specs for tensor in group.tensors}
    steps = [StepGraph(bundle, engines, graph, state_outputs) for graph in graphs]
    groups = [Group(spec) for spec in specs]
    rotary = None
    if variant.rope is not None:
        longest = max((group.capacity for group in specs), default=variant.max_positions)
        rotary = RotaryTable(variant.rope, min(longest, variant.max_positions))
    axes = 1 if rotary is None else rotary.num_axes
    positions = np.repeat(np.arange(variant.max_positions + 1.0)[:, None], axes, axis=1)
    return StepDecoder(Schedule(steps, groups), groups, table, rotary, positions)


class StepDecoder:
    """A `Decoder` over step graphs that share state groups."""

    def __init__(
        self,
        schedule: Schedule,
        groups: Sequence[Group],
        table: EmbeddingTable,
        rotary: RotaryTable | None,
        positions: Array,
        length: int = 0,
    ) -> None:
        """Row r of `positions` float64 [rows + 1, axes] is the position of row r.

        Those from `length` on count on by one: what a row after the prompt gets is there already.
        """
        self._schedule, self._groups, self._table, self._rotary = schedule, groups, table, rotary
        self._limited = [group for group in groups if group.limited]
        self._recurrent = [
            block for group in groups for block in group.blocks if isinstance(block, RecurrentBlock)
        ]
        self._positions = positions
        self._length = self._counting_from = length
        self._bound: dict[tuple[object, ...], BoundStep] = {}

    @property
    def length(self) -> int:
        """Rows consumed so far."""
        return self._length

    @property
    def capacity(self) -> int:
        """Rows that fit, those consumed included."""
        free = [group.capacity - group.used for group in self._limited]
        return min([len(self._positions) - 1, *(self._length + slots for slots in free)])

    def load(self) -> None:
        """Load the graphs of a long prompt, with and without a picture, and of a token after it."""
        for step in self._schedule.ordinary(self.capacity):
            step.load()

    def check_prompt(self, num_rows: int, num_pictures: int = 0) -> None:
        """Raise InputError where a prompt with so many picture groups does not fit, and say why."""
        self._check_room(self._schedule.prompt(num_rows, num_pictures))

    def prefill(self, prompt: Prompt, *, cancelled: Callable[[], bool] | None = None) -> Step:
        """Consume a prompt in chunks, or whole; logits of its last row."""
        num_rows = len(prompt.embeds)
        calls = self._schedule.prompt(num_rows, len(prompt.picture_rows))
        self._check_room(calls)
        for group in self._groups:
            for block in group.blocks:
                if isinstance(block, ConstBlock):
                    block.set(prompt.values)
        end = self._length + num_rows
        self._positions[self._length : end] = np.asarray(prompt.positions).T.reshape(num_rows, -1)
        self._count_on(end, prompt.next_position)
        rows = CallRows(
            embeds=prompt.embeds,
            positions=self._positions[self._length : end],
            length=self._length,
            wanted=(num_rows - 1,),
            values=prompt.values,
            picture_rows=prompt.picture_rows,
            row_weights=prompt.row_weights,
        )
        try:
            return self._consume(calls, rows, cancelled)
        finally:
            if self._length < end:  # cancelled or failed on the way
                self._count_on(self._length, self._positions[self._length])

    def extend(
        self,
        tokens: Sequence[int],
        *,
        rows: Sequence[int] | None = None,
        values: Mapping[str, Array] | None = None,
    ) -> Step:
        """Consume tokens; logits of `rows` of them (ascending), of all by default."""
        num_rows = len(tokens)
        wanted = tuple(range(num_rows)) if rows is None else _wanted(rows, num_rows)
        phase = "verify" if num_rows > 1 else "decode"
        calls = self._schedule.calls(phase, num_rows, every=len(wanted) > 1)
        self._check_room(calls)
        length = self._length
        rows_here = CallRows(
            embeds=self._table.row(tokens[0]) if num_rows == 1 else self._table.rows(tokens),
            positions=self._positions[length : length + num_rows],
            length=length,
            wanted=wanted,
            values=values or {},
        )
        return self._consume(calls, rows_here)

    def rewind(self, length: int) -> None:
        """Forget all rows from `length` on."""
        if not 0 <= length <= self._length:
            raise EngineError(
                f"cannot rewind to row {length}, the decoder has consumed {self._length}",
                hint="rewind goes back to a length that the decoder has had",
            )
        if length < self._length:
            for group in self._groups:
                group.check_rewind(length)
            for group in self._groups:
                group.rewind(length)
            self._length = length
        if length < self._counting_from:
            self._count_on(length, self._positions[length])

    def fork(self) -> StepDecoder:
        """An independent decoder in the same state, on the same loaded graphs."""
        groups = [group.fork() for group in self._groups]
        return StepDecoder(
            self._schedule,
            groups,
            self._table,
            self._rotary,
            self._positions.copy(),
            self._length,
        )

    def _consume(
        self, calls: Calls, rows: CallRows, cancelled: Callable[[], bool] | None = None
    ) -> Step:
        """Run rows, which fit, in the calls that were planned for them."""
        if len(calls.chunks) == 1:
            return self._run(calls.chunks[0][0], rows)
        begin, steps = 0, []
        for step, size in calls.chunks:
            if begin and cancelled is not None and cancelled():
                raise Cancelled
            end = begin + size
            here = tuple([row - begin for row in rows.wanted if begin <= row < end])
            chunk = CallRows(
                embeds=rows.embeds[begin:end],
                positions=rows.positions[begin:end],
                length=rows.length + begin,
                wanted=here or (size - 1,),
                values=step.values_of_rows(rows.values, begin, end, calls.num_rows),
            )
            result = self._run(step, chunk)
            # The arrays of a step hold until the next call only.
            logits = result.logits[: len(here)].copy()
            extras = {name: array.copy() for name, array in result.extras.items()}
            steps.append(Step(logits=logits, extras=extras))
            begin = end
        return Step(
            logits=np.concatenate([step.logits for step in steps]),
            extras={
                name: np.concatenate([step.extras[name] for step in steps], axis=1)
                if per_row
                else steps[-1].extras[name]
                for name, per_row in calls.chunks[-1][0].extras.items()
            },
        )

    def _run(self, step: StepGraph, rows: CallRows) -> Step:
        """One call of a graph, committed."""
        num_valid = len(rows.embeds)
        bound = self._bind(step, rows)
        result = bound.run(rows)
        for group, written, dropped in zip(self._groups, bound.written, bound.dropped, strict=True):
            group.commit(written, rows.length, num_valid, dropped)
        self._length = rows.length + num_valid
        return result

    def _bind(self, step: StepGraph, rows: CallRows) -> BoundStep:
        """The arrays of a call of this size, kept where it will come again."""
        num_rows = step.graph.rows or len(rows.embeds)
        num_logits = step.num_logits(num_rows, len(rows.wanted))
        num_pictures = 0 if step.pictures is None else len(rows.picture_rows)
        # Recurrent state takes turns between two copies, which are bound separately.
        turn = self._recurrent[0].turn if self._recurrent else 0
        shapes = tuple([(name, value.shape) for name, value in rows.values.items()])
        key = (step.graph.name, num_rows, num_logits, num_pictures, turn, shapes)
        bound = self._bound.get(key)
        if bound is None:
            sizes = Sizes(rows=num_rows, logits=num_logits, pictures=num_pictures)
            bound = BoundStep(step, sizes, self._groups, self._rotary, rows.values)
            if step.graph.rows or num_rows <= KEPT_ROWS:
                self._bound[key] = bound
        return bound

    def _count_on(self, row: int, position: float | Sequence[float] | Array) -> None:
        """Let positions count on by one, from `position` at `row`."""
        steps = np.arange(len(self._positions) - row)[:, None]
        self._positions[row:] = np.asarray(position) + steps
        self._counting_from = row

    def _check_room(self, calls: Calls) -> None:
        """Refuse rows that do not fit, before any is consumed."""
        excess = self._length + calls.num_rows - (len(self._positions) - 1)
        for group, slots in zip(self._limited, calls.slots, strict=True):
            excess = max(excess, group.used + slots - group.capacity)
        if excess > 0:
            raise InputError(
                f"{calls.what} of {calls.num_rows} tokens is {excess} too long: "
                f"{self._length} of the {self.capacity} tokens of the context are used",
                hint=f"shorten it by {excess} tokens, or compile with a larger context",
            )


def _wanted(rows: Sequence[int], num_rows: int) -> tuple[int, ...]:
    """The rows that logits are wanted of: some rows of the call, ascending."""
    wanted = tuple(rows)
    if not wanted or list(wanted) != sorted(set(wanted) & set(range(num_rows))):
        raise InputError(
            f"logits are wanted of rows {list(wanted)} of a call of {num_rows} tokens",
            hint="name some of its rows, counted from 0 and ascending",
        )
    return wanted


def _check_state(graphs: Sequence[GraphSpec], groups: Sequence[StateGroup]) -> None:
    """Every graph reads and renews all state: a tensor that one left out would fall behind."""
    if not groups:
        raise BundleError(
            f"step graph {graphs[0].name!r} has no state, this runtime cannot decode without",
            hint="upgrade edgevlm-runtime, or compile for a target with a cache",
        )
    for graph in graphs:
        inputs = {tensor.source: tensor for tensor in graph.inputs}
        outputs = {tensor.name for tensor in graph.outputs}
        for group in groups:
            for tensor in group.tensors:
                fed = inputs.get(f"state:{tensor.name}")
                renewed = tensor.kind == "const" or tensor.output in outputs
                if fed is None or fed.name != tensor.input or not renewed:
                    raise BundleError(
                        f"step graph {graph.name!r} does not take state {tensor.name!r} as "
                        f"{tensor.input!r} and give it as {tensor.output!r}",
                        hint="compile the bundle again",
                    )
