"""A step graph in use: what its dimensions mean, and a call of T rows with its arrays bound."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode import feeds
from edgevlm_runtime.decode.feeds import CallRows, Fill
from edgevlm_runtime.decode.groups import Group
from edgevlm_runtime.decode.protocol import Step
from edgevlm_runtime.engine import Array, Engine, Engines
from edgevlm_runtime.engines.table import read_array
from edgevlm_runtime.errors import BundleError, EngineError
from edgevlm_runtime.manifest import GraphSpec, TensorSpec, carrier
from edgevlm_runtime.rotary import RotaryTable

LOGITS = "logits"
# What was made for a call of few rows is kept: such calls recur, chunks of a prompt hardly do.
KEPT_ROWS = 16
Shape = tuple[int | str, ...]

# T rows of a call, n of them valid, R rows of logits, P picture groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """T, R and P of a call."""

    rows: int
    logits: int
    pictures: int


class StepGraph:
    """What the manifest says of a step graph, worked out. It is loaded at its first call."""

    def __init__(
        self, bundle: Bundle, engines: Engines, graph: GraphSpec, state_outputs: Collection[str]
    ) -> None:
        """Find the dimensions that are T, R and P, and the extras: outputs that are none of these.

        `extras` says of each name whether it has one entry for each row of a call. `pictures` is P,
        a number where a call takes as many, None where the graph does not ask where they begin.
        """
        self.bundle, self.graph, self._engines = bundle, graph, engines
        inputs = {tensor.source.partition(":")[0]: tensor for tensor in graph.inputs}
        outputs = {tensor.name for tensor in graph.outputs}
        if "embeds" not in inputs or LOGITS not in outputs:
            raise BundleError(
                f"step graph {graph.name!r} lacks an input of source 'embeds' or its logits",
                hint="compile the bundle again",
            )
        self._rows = inputs["embeds"].shape[1]
        self._logit_rows = inputs["logit_rows"].shape[0] if "logit_rows" in inputs else self._rows
        self.picks_logits = "logit_rows" in inputs
        self.pictures = inputs["picture_rows"].shape[0] if "picture_rows" in inputs else None
        self.extras = {
            tensor.name: self._is_per_row(tensor.shape)
            for tensor in graph.outputs
            if tensor.name != LOGITS and tensor.name not in state_outputs
        }
        self._values_per_row = {
            tensor.source.partition(":")[2]
            for tensor in graph.inputs
            if tensor.source.startswith("output:") and self._is_per_row(tensor.shape)
        }

    def load(self) -> Engine:
        """The graph's engine, loaded now if it was not before."""
        return self._engines.open(self.graph)

    @property
    def max_rows(self) -> int | None:
        """The most rows of a call; None where any number goes."""
        return self.graph.rows or self.graph.max_rows

    @property
    def max_verify_rows(self) -> int | None:
        """The most rows of a call that wants logits of all of them."""
        if isinstance(self._logit_rows, int) and self.max_rows is not None:
            return min(self._logit_rows, self.max_rows)
        return self.max_rows

    def takes(self, num_rows: int, num_pictures: int) -> bool:
        """Whether these rows and picture groups go into one call."""
        fits = self.max_rows is None or num_rows <= self.max_rows
        return fits and (not isinstance(self.pictures, int) or num_pictures == self.pictures)

    def dropped(self, group: str, num_pictures: int) -> int:
        """How many rows of a call never reach a state group."""
        dropped = self.graph.dropped.get(group, 0)
        return dropped if self.pictures is None else dropped * num_pictures

    def num_logits(self, num_rows: int, num_wanted: int) -> int:
        """R of a call of T rows."""
        if isinstance(self._logit_rows, int):
            return self._logit_rows
        return num_wanted if self.picks_logits else num_rows

    def values_of_rows(
        self, values: Mapping[str, Array], begin: int, end: int, num_rows: int
    ) -> Mapping[str, Array]:
        """The part of named values that belongs to some rows, where a value has one per row."""
        return {
            name: value[:, begin:end]
            if name in self._values_per_row and value.shape[1] == num_rows
            else value
            for name, value in values.items()
        }

    def sized(self, shape: Shape, sizes: Sizes) -> tuple[int, ...] | None:
        """The shape in a call, None where it is only known after it."""
        names: dict[int | str | None, int] = {
            self._rows: sizes.rows,
            self._logit_rows: sizes.logits,
            self.pictures: sizes.pictures,
        }
        if not all(isinstance(dim, int) or dim in names for dim in shape):
            return None
        return tuple(dim if isinstance(dim, int) else names[dim] for dim in shape)

    def _is_per_row(self, shape: Shape) -> bool:
        """Whether a tensor [1, T, ...] has one entry for each row of the call."""
        return len(shape) > 1 and shape[1] == self._rows


class BoundStep:
    """A call of a step graph of some sizes, its arrays bound to a decoder's."""

    def __init__(
        self,
        step: StepGraph,
        sizes: Sizes,
        groups: Sequence[Group],
        rotary: RotaryTable | None,
        values: Mapping[str, Array],
    ) -> None:
        """Make the arrays, and the list of what fills them."""
        self._step, self._sizes = step, sizes
        self._groups = {group.name: group for group in groups}
        self._rotary = rotary
        self._fills: list[Fill] = []
        # One number per group: the rows of a call that never reach it.
        self.dropped = [step.dropped(group.name, sizes.pictures) for group in groups]
        # One list per group, one array per block: what the graph writes of its state.
        self.written = [
            [block.writes(sizes.rows - dropped) for block in group.blocks]
            for group, dropped in zip(groups, self.dropped, strict=True)
        ]
        self._state_inputs, state_outputs = _state_arrays(groups, self.written)
        inputs = {tensor.name: self._input(tensor, values) for tensor in step.graph.inputs}
        self._rope_feeds(inputs)
        outputs = {
            tensor.name: self._output(tensor, state_outputs.get(tensor.name))
            for tensor in step.graph.outputs
        }
        self._call = step.load().bind(inputs, outputs)
        # Bound outputs stay where they are, so views of them need not be made at every token.
        self._stays = step.picks_logits and all(array is not None for array in outputs.values())
        self._shown: tuple[object, ...] = ()
        self._result: Step | None = None

    def run(self, rows: CallRows) -> Step:
        """Fill the inputs and run; the state is not committed."""
        for fill in self._fills:
            fill(rows)
        outputs = self._call.run()
        shown = (len(rows.embeds), rows.wanted)
        if self._result is None or not self._stays or shown != self._shown:
            self._shown, self._result = shown, self._step_of(outputs, *shown)
        return self._result

    def _step_of(
        self, outputs: Mapping[str, Array], num_valid: int, wanted: tuple[int, ...]
    ) -> Step:
        """The wanted rows of the logits, and the extras without the rows of padding."""
        logits = outputs[LOGITS][0]
        logits = logits[: len(wanted)] if self._step.picks_logits else logits[list(wanted)]
        extras = {
            name: outputs[name][:, :num_valid] if per_row else outputs[name]
            for name, per_row in self._step.extras.items()
        }
        return Step(logits=logits, extras=extras)

    def _output(self, tensor: TensorSpec, state: Array | None) -> Array | None:
        """The array of an output: of the state, or a new one, or None where its size is unknown."""
        shape = self._step.sized(tensor.shape, self._sizes)
        if state is None:
            return None if shape is None else np.zeros(shape, tensor.dtype)
        if shape not in (None, state.shape) or carrier(tensor.dtype) != state.dtype:
            raise BundleError(
                f"graph {self._step.graph.name!r} gives state {tensor.name!r} as {tensor.dtype} "
                f"{list(shape or ())}, it is kept as {state.dtype} {list(state.shape)}",
                hint="compile the bundle again",
            )
        return state

    def _input(self, tensor: TensorSpec, values: Mapping[str, Array]) -> Array:
        """The array of an input; what fills it is put on the list."""
        graph = self._step.graph
        kind, _, name = tensor.source.partition(":")
        if kind == "state":
            return self._state_inputs[name]
        if kind == "constant":
            return np.array(read_array(self._step.bundle, name), tensor.dtype)
        shape = self._step.sized(tensor.shape, self._sizes)
        if kind == "output":
            if name not in values:
                raise EngineError(
                    f"graph {graph.name!r} wants output {name!r}, which nothing gave",
                    hint="pass it with the prompt or the tokens, as values={...}",
                )
            shape = shape or values[name].shape
        if shape is None:
            raise BundleError(
                f"input {tensor.name!r} of graph {graph.name!r} has an unknown size",
                hint="compile the bundle again",
            )
        array = np.zeros(shape, tensor.dtype)
        fill = self._feed(kind, name, array, tensor)
        if fill is not None:
            self._fills.append(fill)
        return array

    def _feed(self, kind: str, name: str, array: Array, tensor: TensorSpec) -> Fill | None:
        """What fills an input at every call; None for the rotary tables, which go together."""
        graph = self._step.graph
        if kind == "embeds":
            return feeds.embeds_feed(array)
        if kind == "last_row":
            return feeds.last_row_feed(array)
        if kind == "picture_rows":
            return feeds.picture_rows_feed(array)
        if kind == "row_weights":
            return feeds.row_weights_feed(array, name, graph)
        if kind == "logit_rows":
            return feeds.logit_rows_feed(array)
        if kind == "row_valid":
            return feeds.row_valid_feed(array)
        if kind == "output":
            return feeds.value_feed(array, tensor, graph)
        if kind in ("rope_cos", "rope_sin"):
            return None
        if kind in ("last_slot", "total", "used", "mask"):
            group = self._groups[name]
            num_rows = self._sizes.rows - self._step.dropped(name, self._sizes.pictures)
            if kind == "mask":
                feed = feeds.window_mask_feed if group.windowed else feeds.mask_feed
                return feed(array, group, graph.mask_value)
            offset = {"last_slot": num_rows - 1, "total": num_rows, "used": 0}[kind]
            return feeds.slots_feed(array, group, offset)
        raise BundleError(
            f"input {tensor.name!r} of step graph {graph.name!r} has source {tensor.source!r}",
            hint="only graphs that run before the decoder take it; compile the bundle again",
        )

    def _rope_feeds(self, inputs: Mapping[str, Array]) -> None:
        """Fill the two rotary tables of all positions together, and those of each packed group."""
        tables: dict[str, dict[str, Array]] = {}
        for tensor in self._step.graph.inputs:
            kind, _, name = tensor.source.partition(":")
            if kind in ("rope_cos", "rope_sin"):
                tables.setdefault(name, {})[tensor.source] = inputs[tensor.name]
        for name, pair in tables.items():
            if len(pair) < 2 or self._rotary is None:
                raise BundleError(
                    f"step graph {self._step.graph.name!r} wants {' and '.join(sorted(pair))}, "
                    "which take a rope in the manifest and each other",
                    hint="compile the bundle again",
                )
            cos, sin = (pair[source] for source in sorted(pair))
            feed = feeds.rope_feed(cos, sin, self._rotary)
            if name:
                group = self._groups[name]
                dropped = self._step.dropped(name, self._sizes.pictures)
                feed = feeds.packed_rope_feed(cos, sin, self._rotary, group, dropped)
            self._fills.append(feed)


def _state_arrays(
    groups: Sequence[Group], written: Sequence[Sequence[Array | None]]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What a graph reads of the state, by tensor name; what it writes of it, by output name."""
    inputs: dict[str, Array] = {}
    outputs: dict[str, Array] = {}
    for group, arrays in zip(groups, written, strict=True):
        for block, new in zip(group.blocks, arrays, strict=True):
            old = block.reads()
            for index, tensor in enumerate(block.tensors):
                inputs[tensor.name] = old[index]
                if new is old:  # in place: one array, so that the engine sees that it is one
                    outputs[tensor.output] = inputs[tensor.name]
                elif new is not None:
                    outputs[tensor.output] = new[index]
    return inputs, outputs
