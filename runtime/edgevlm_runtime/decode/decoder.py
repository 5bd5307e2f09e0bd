"""The decoder: step graphs of a bundle with their state, for every form of graph.

Graphs differ in rows (any number, or a fixed one with padding), in what they write (their cache in
place, or new rows to commit) and in phase. All of that is data in the manifest: a call takes the
graph that its phase and number of rows ask for, and all graphs share the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode.feeds import CallRows
from edgevlm_runtime.decode.groups import Group
from edgevlm_runtime.decode.protocol import Cancelled, Prompt, Step
from edgevlm_runtime.decode.step_graph import BoundStep, StepGraph
from edgevlm_runtime.engine import Array, Engines
from edgevlm_runtime.engines.table import EmbeddingTable
from edgevlm_runtime.errors import BundleError, EngineError, InputError
from edgevlm_runtime.manifest import StateGroup
from edgevlm_runtime.rotary import RotaryTable
from edgevlm_runtime.state import ConstBlock, RecurrentBlock, check_memory

# Bound calls of few rows recur and are kept; a piece of a prompt is bound for one call.
_KEPT_ROWS = 16

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
    steps = [StepGraph(bundle, engines, graph) for graph in graphs]
    sources = {tensor.source for graph in graphs for tensor in graph.inputs}
    specs = [
        group
        for group in variant.state
        if any(f"state:{tensor.name}" in sources for tensor in group.tensors)
    ]
    _check_state(steps, specs)
    check_memory(specs)
    rotary = None
    if variant.rope is not None:
        longest = max((group.capacity for group in specs), default=variant.max_positions)
        rotary = RotaryTable(variant.rope, min(longest, variant.max_positions))
    axes = 1 if rotary is None else rotary.num_axes
    return StepDecoder(
        steps,
        [Group(spec) for spec in specs],
        table,
        rotary,
        np.zeros((variant.max_positions + 1, axes)),
    )


class StepDecoder:
    """A `Decoder` over step graphs that share state groups."""

    def __init__(
        self,
        steps: Sequence[StepGraph],
        groups: Sequence[Group],
        table: EmbeddingTable,
        rotary: RotaryTable | None,
        positions: Array,
        length: int = 0,
    ) -> None:
        """Row r of `positions` is the position of row r; the row after the last is the next one."""
        self._steps, self._groups, self._table, self._rotary = steps, groups, table, rotary
        self._positions = positions
        self._length = length
        self._bound: dict[tuple[object, ...], BoundStep] = {}
        self._recurrent = [
            block for group in groups for block in group.blocks if isinstance(block, RecurrentBlock)
        ]

    @property
    def length(self) -> int:
        """Rows consumed so far."""
        return self._length

    @property
    def capacity(self) -> int:
        """Rows that fit, those consumed included."""
        free = [len(self._positions) - 1 - self._length]
        free += [group.free(self._length) for group in self._groups if group.limited]
        return self._length + min(free)

    def load(self) -> None:
        """Load the graphs of a long prompt and of a token after it."""
        for step in (self._choose("prefill", self.capacity), self._choose("decode", 1)):
            step.engines.open(step.graph)

    def check_prompt(self, num_rows: int) -> None:
        """Raise InputError where a prompt does not fit, and say by how much."""
        self._check_room("prefill", list(self._chunks("prefill", num_rows, every=False)))

    def prefill(self, prompt: Prompt, *, cancelled: Callable[[], bool] | None = None) -> Step:
        """Consume a prompt in chunks; logits of its last row."""
        num_rows, axes = len(prompt.embeds), self._positions.shape[1]
        if num_rows == 0:
            raise InputError("prompt has no rows", hint="give at least one token")
        for group in self._groups:
            for block in group.blocks:
                if isinstance(block, ConstBlock):
                    block.set(prompt.values)
        positions = np.asarray(prompt.positions).T.reshape(num_rows, -1)
        positions = np.broadcast_to(positions, (num_rows, axes))
        step = self._consume(
            "prefill", prompt.embeds, positions, [num_rows - 1], prompt.values, cancelled
        )
        self._positions[self._length] = prompt.next_position
        return step

    def extend(
        self,
        tokens: Sequence[int],
        *,
        rows: Sequence[int] | None = None,
        values: Mapping[str, Array] | None = None,
    ) -> Step:
        """Consume tokens; logits of `rows` of them (ascending), of all by default."""
        num_rows = len(tokens)
        phase = "decode" if num_rows == 1 else "verify"
        positions = self._positions[self._length] + np.arange(num_rows)[:, None]
        wanted = range(num_rows) if rows is None else rows
        embeds = self._table.rows(np.asarray(tokens))
        return self._consume(phase, embeds, positions, wanted, values or {}, None)

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

    def fork(self) -> StepDecoder:
        """An independent decoder in the same state, on the same loaded graphs."""
        groups = [group.fork(self._length) for group in self._groups]
        positions = self._positions.copy()
        return StepDecoder(self._steps, groups, self._table, self._rotary, positions, self._length)

    def _consume(
        self,
        phase: str,
        embeds: Array,
        positions: Array,
        wanted: Sequence[int],
        values: Mapping[str, Array],
        cancelled: Callable[[], bool] | None,
    ) -> Step:
        """Run rows [T, W] at positions [T, axes] in as few calls as the graphs allow."""
        num_rows = len(embeds)
        chunks = list(self._chunks(phase, num_rows, every=len(wanted) > 1))
        self._check_room(phase, chunks)
        begin, steps = 0, []
        for step, size in chunks:
            if begin and cancelled is not None and cancelled():
                raise Cancelled
            end = begin + size
            here = [row - begin for row in wanted if begin <= row < end]
            rows = CallRows(
                embeds=embeds[begin:end],
                positions=positions[begin:end],
                length=self._length,
                wanted=here or [size - 1],
                values=step.values_of_rows(values, begin, end, num_rows) if values else values,
            )
            result = self._run(step, rows)
            if size == num_rows:
                return result
            # The arrays of a step hold until the next call only.
            logits = result.logits[: len(here)].copy()
            extras = {name: array.copy() for name, array in result.extras.items()}
            steps.append(Step(logits=logits, extras=extras))
            begin = end
        return Step(
            logits=np.concatenate([step.logits for step in steps]),
            extras={
                name: np.concatenate([step.extras[name] for step in steps], axis=1)
                if name in chunks[-1][0].per_row
                else array
                for name, array in steps[-1].extras.items()
            },
        )

    def _run(self, step: StepGraph, rows: CallRows) -> Step:
        """One call of a graph, committed."""
        num_valid = len(rows.embeds)
        bound = self._bind(step, rows)
        result = bound.run(rows)
        for group, written in zip(self._groups, bound.written, strict=True):
            dropped = step.graph.dropped.get(group.name, 0)
            group.commit(written, self._length, num_valid, dropped)
        end = self._length + num_valid
        self._positions[self._length : end] = rows.positions
        self._positions[end] = rows.positions[-1] + 1
        self._length = end
        return result

    def _bind(self, step: StepGraph, rows: CallRows) -> BoundStep:
        """The arrays of a call of this size, kept where it will come again."""
        num_rows = step.graph.rows or len(rows.embeds)
        num_logits = step.num_logits(num_rows, len(rows.wanted))
        # Recurrent state takes turns between two copies, which are bound separately.
        turn = self._recurrent[0].turn if self._recurrent else 0
        shapes = tuple((name, value.shape) for name, value in rows.values.items())
        key = (step.graph.name, num_rows, num_logits, turn, shapes)
        bound = self._bound.get(key)
        if bound is None:
            bound = BoundStep(step, num_rows, num_logits, self._groups, self._rotary, rows.values)
            if step.graph.rows or num_rows <= _KEPT_ROWS:
                self._bound[key] = bound
        return bound

    def _chunks(self, phase: str, num_rows: int, *, every: bool) -> Iterator[tuple[StepGraph, int]]:
        """Which graphs consume these rows; `every` where logits of all of them are wanted."""
        while num_rows:
            step = self._choose(phase, num_rows)
            most = step.max_verify_rows if every else step.max_rows
            size = num_rows if most is None else min(num_rows, most)
            yield step, size
            num_rows -= size

    def _choose(self, phase: str, num_rows: int) -> StepGraph:
        """The graph of the phase that pads least, else the one that takes the most rows."""
        steps = [step for step in self._steps if phase in step.graph.phases]
        if not steps:
            steps = [step for step in self._steps if "decode" in step.graph.phases]
        fitting = [step for step in steps if step.max_rows is None or step.max_rows >= num_rows]
        if fitting:
            return min(fitting, key=lambda step: step.graph.rows or num_rows)
        return max(steps, key=lambda step: step.max_rows or 0)

    def _check_room(self, phase: str, chunks: Sequence[tuple[StepGraph, int]]) -> None:
        """Refuse rows that do not fit, before any is consumed."""
        for step, size in chunks:
            dropped = max(step.graph.dropped.values(), default=0)
            if dropped >= size:
                raise InputError(
                    f"graph {step.graph.name!r} drops {dropped} of the rows of every call, "
                    f"got a piece of {size}",
                    hint="lengthen the prompt, or compile with another size of pieces",
                )
        num_rows = sum(size for _, size in chunks)
        excess = num_rows - (len(self._positions) - 1 - self._length)
        for group in self._groups:
            if group.limited:
                needed = sum(size - step.graph.dropped.get(group.name, 0) for step, size in chunks)
                last, size = chunks[-1]
                if group.inplace:  # such a graph writes its rows of padding, too
                    needed += (last.graph.rows or size) - size
                excess = max(excess, needed - group.free(self._length))
        if excess > 0:
            what = "prompt" if phase == "prefill" else "call"
            raise InputError(
                f"{what} of {num_rows} tokens is {excess} too long: {self._length} of the "
                f"{self.capacity} tokens of the context are used",
                hint=f"shorten it by {excess} tokens, or compile with a larger context",
            )


def _check_state(steps: Sequence[StepGraph], groups: Sequence[StateGroup]) -> None:
    """Every graph reads and renews all state: a tensor that one left out would fall behind."""
    phases = {phase for step in steps for phase in step.graph.phases}
    if "decode" not in phases:
        raise BundleError(
            f"no graph of role {steps[0].graph.role!r} serves the phase 'decode'",
            hint="compile the bundle again",
        )
    if not groups:
        raise BundleError(
            f"step graph {steps[0].graph.name!r} has no state, this runtime cannot decode without",
            hint="upgrade edgevlm-runtime, or compile for a target with a cache",
        )
    for step in steps:
        inputs = {tensor.source: tensor for tensor in step.graph.inputs}
        outputs = {tensor.name for tensor in step.graph.outputs}
        for group in groups:
            for tensor in group.tensors:
                fed = inputs.get(f"state:{tensor.name}")
                renewed = tensor.kind == "const" or tensor.output in outputs
                if fed is None or fed.name != tensor.input or not renewed:
                    raise BundleError(
                        f"step graph {step.graph.name!r} does not take state {tensor.name!r} as "
                        f"{tensor.input!r} and give it as {tensor.output!r}",
                        hint="compile the bundle again",
                    )
