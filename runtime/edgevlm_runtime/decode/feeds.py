"""Inputs of a step graph, by their source: for each the array to bind, and how a call fills it.

A feed is made once per size of a call; what it writes at every call is as little as can be: one
row of the embedding, two numbers of a length, the mask columns that have opened since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgevlm_runtime.decode.groups import Group
from edgevlm_runtime.engine import Array
from edgevlm_runtime.errors import EngineError
from edgevlm_runtime.manifest import GraphSpec, TensorSpec
from edgevlm_runtime.rotary import RotaryTable

# T rows of the graph's call, n of them valid, G those that reach a group, S slots, R logit rows


@dataclass(kw_only=True, slots=True)
class CallRows:
    """What one call consumes after `length` rows: `embeds` [n, W], `positions` float64 [n, axes].

    `wanted` are the rows that logits are wanted for, `values` the named outputs of other graphs.
    `picture_rows` [P] and `row_weights` [n] by kind are those of a prompt that is consumed whole.
    """

    embeds: Array
    positions: Array
    length: int
    wanted: tuple[int, ...]
    values: Mapping[str, Array] = field(default_factory=dict)
    picture_rows: Sequence[int] | Array = ()
    row_weights: Mapping[str, Array] = field(default_factory=dict)


Fill = Callable[[CallRows], None]


def embeds_feed(array: Array) -> Fill:
    """Embeddings [1, T, W]; rows of padding are zero."""
    rows = array[0]

    def fill(call: CallRows) -> None:
        num_valid = len(call.embeds)
        rows[:num_valid] = call.embeds
        if num_valid < len(rows):
            rows[num_valid:] = 0

    return fill


def rope_feed(cos: Array, sin: Array, table: RotaryTable) -> Fill:
    """Cosines and sines, at least T rows each."""

    def fill(call: CallRows) -> None:
        table.fill(call.positions, cos, sin)

    return fill


def packed_rope_feed(
    cos: Array, sin: Array, table: RotaryTable, group: Group, dropped: int
) -> Fill:
    """The same for a group whose rows stand without gaps; it gets n rows less those dropped."""

    def fill(call: CallRows) -> None:
        kept = call.positions[: len(call.positions) - dropped]
        dropped_before = call.length - group.used
        table.fill(kept - dropped_before, cos, sin)

    return fill


def slots_feed(array: Array, group: Group, offset: int) -> Fill:
    """The used slots of a group plus an offset, in every element."""

    def fill(call: CallRows) -> None:
        array.fill(group.used + offset)

    return fill


def row_valid_feed(array: Array) -> Fill:
    """[1, T, 1]: one for valid rows, zero for padding."""

    def fill(call: CallRows) -> None:
        array[0, : len(call.embeds)] = 1
        array[0, len(call.embeds) :] = 0

    return fill


def last_row_feed(array: Array) -> Fill:
    """[1]: the last valid row."""

    def fill(call: CallRows) -> None:
        array.fill(len(call.embeds) - 1)

    return fill


def picture_rows_feed(array: Array) -> Fill:
    """[P]: the first row of every picture group."""

    def fill(call: CallRows) -> None:
        array[:] = call.picture_rows

    return fill


def row_weights_feed(array: Array, kind: str, graph: GraphSpec) -> Fill:
    """[1, T]: the weights of a kind, zero for padding."""

    def fill(call: CallRows) -> None:
        if kind not in call.row_weights:
            raise EngineError(
                f"graph {graph.name!r} wants the row weights {kind!r}, which the prompt lacks",
                hint="pass them with the prompt, as row_weights={...}",
            )
        num_valid = len(call.embeds)
        array[0, :num_valid] = call.row_weights[kind]
        array[0, num_valid:] = 0

    return fill


def logit_rows_feed(array: Array) -> Fill:
    """[R]: the wanted rows, the last of them repeated. From token to token they are the same."""
    written: tuple[int, ...] = ()

    def fill(call: CallRows) -> None:
        nonlocal written
        if call.wanted != written:
            written = call.wanted
            array[: len(written)] = written
            array[len(written) :] = written[-1]

    return fill


def mask_feed(array: Array, group: Group, closed: float) -> Fill:
    """[1, 1, G, S + G]: used slots, then the rows of this call up to the row itself.

    Between calls only the columns between the old and the new used length change.
    """
    num_rows = array.shape[2]
    slots = array[0, 0, :, : group.capacity]
    array[0, 0, :, group.capacity :] = np.triu(np.full((num_rows, num_rows), closed), 1)
    slots[...] = closed
    opened = 0

    def fill(call: CallRows) -> None:
        nonlocal opened
        slots[:, opened : group.used] = 0
        slots[:, group.used : opened] = closed
        opened = group.used

    return fill


def window_mask_feed(array: Array, group: Group, closed: float) -> Fill:
    """[1, 1, G, W + G]: every row sees the W rows that end with itself, wherever they are.

    Slot s of the ring holds the last row before this call whose number is s modulo W.
    """
    num_rows, window = array.shape[2], group.capacity
    row, column = np.arange(num_rows)[:, None], np.arange(num_rows)
    array[0, 0, :, window:] = np.where((column <= row) & (column > row - window), 0, closed)
    slots = array[0, 0, :, :window]

    def fill(call: CallRows) -> None:
        used = group.used
        held = used - 1 - (used - 1 - np.arange(window)) % window
        slots[...] = np.where((held >= 0) & (held > used + row - window), 0, closed)

    return fill


def value_feed(array: Array, spec: TensorSpec, graph: GraphSpec) -> Fill:
    """A named output of another graph; where it has fewer rows [1, n, ..] the rest is zero."""
    name = spec.source.partition(":")[2]

    def fill(call: CallRows) -> None:
        value = call.values[name]
        if value.shape == array.shape:
            array[...] = value
        elif value.ndim > 1 and value.shape[1] < array.shape[1] and _alike(value, array):
            array[:, : value.shape[1]] = value
            array[:, value.shape[1] :] = 0
        else:
            raise EngineError(
                f"input {spec.name!r} of graph {graph.name!r} takes {list(array.shape)}, "
                f"output {name!r} has {list(value.shape)}"
            )

    return fill


def _alike(value: Array, array: Array) -> bool:
    """Equal shapes but for the rows."""
    return value.shape[:1] + value.shape[2:] == array.shape[:1] + array.shape[2:]
