"""Graphs that run before the decoder, in an order derived from what feeds them.

A graph whose input is `pixels` or `grid`, or the output of one that has such an input, runs once
per tile or picture; any other runs once per prompt. So a graph that wants `question_embeds` waits
for the question without anything here knowing about it. What the calls of a graph give is joined
along axis 1, the rows, in the order in which the pictures stand in the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import numpy as np

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.engine import Array, Engines, as_input
from edgevlm_runtime.engines.table import read_array
from edgevlm_runtime.errors import BundleError, InputError
from edgevlm_runtime.image import PreparedImage
from edgevlm_runtime.manifest import GraphSpec, TensorSpec

IMAGE_EMBEDS = "image_embeds"
_PICTURE = {"pixels", "grid"}
_DECODING = {"embeds", "state", "tokens"}


class Encoder:
    """The graphs before the decoder."""

    def __init__(self, bundle: Bundle, engines: Engines) -> None:
        """Order the graphs; they are loaded when they are first called."""
        self._bundle, self._engines = bundle, engines
        self._order = _ordered(_before_decoding(bundle.variant.graphs))
        self._per_picture: set[str] = set()
        made_per_picture: set[str] = set()
        for graph in self._order:
            sources = {tensor.source for tensor in graph.inputs}
            named = {f"output:{name}" for name in made_per_picture}
            if sources & (_PICTURE | named):
                self._per_picture.add(graph.name)
                made_per_picture |= {tensor.name for tensor in graph.outputs}

    def load(self) -> None:
        """Load all graphs but those that are for one of several picture grids."""
        for graph in self._order:
            if graph.grid is None:
                self._engines.open(graph)

    def run(self, pictures: Sequence[PreparedImage], question: Array) -> dict[str, Array]:
        """The named outputs of all graphs, for `question` [Q, W], the text rows of the prompt."""
        outputs: dict[str, Array] = {}
        for graph in self._order:
            if graph.name not in self._per_picture:
                outputs |= self._call(graph, {}, outputs, question)
        calls = []
        for picture in pictures:
            for feeds in picture.feeds:
                made = dict(outputs)
                for graph in self._serving(picture.layout.grid):
                    made |= self._call(graph, feeds, made, question)
                calls.append(made)
        for name in calls[0].keys() - outputs.keys() if calls else ():
            outputs[name] = np.concatenate([made[name] for made in calls], axis=1)
        return outputs

    def _serving(self, grid: tuple[int, int] | None) -> list[GraphSpec]:
        """The graphs for a picture of a grid, in order."""
        graphs = [graph for graph in self._order if graph.name in self._per_picture]
        serving = [graph for graph in graphs if graph.grid is None or graph.grid == grid]
        if graphs and not serving:
            grids = ", ".join(f"{graph.grid[0]}x{graph.grid[1]}" for graph in graphs if graph.grid)
            raise InputError(
                f"no vision graph for a picture grid of {grid}", hint=f"the bundle has {grids}"
            )
        return serving

    def _call(
        self,
        graph: GraphSpec,
        feeds: Mapping[str, Array],
        made: Mapping[str, Array],
        question: Array,
    ) -> Mapping[str, Array]:
        inputs = {
            tensor.name: self._input(graph, tensor, feeds, made, question)
            for tensor in graph.inputs
        }
        outputs: dict[str, Array | None] = {tensor.name: None for tensor in graph.outputs}
        return self._engines.open(graph).bind(inputs, outputs).run()

    def _input(
        self,
        graph: GraphSpec,
        tensor: TensorSpec,
        feeds: Mapping[str, Array],
        made: Mapping[str, Array],
        question: Array,
    ) -> Array:
        """The value of an input, by its source."""
        kind, _, name = tensor.source.partition(":")
        if kind == "question_embeds":
            value = _question_rows(tensor, question)
        elif kind == "output" and name in made:
            value = made[name]
        elif kind == "constant":
            value = read_array(self._bundle, name)
        elif kind in feeds:
            value = feeds[kind]
        else:
            raise BundleError(
                f"input {tensor.name!r} of graph {graph.name!r} has source {tensor.source!r}, "
                "which is not there before the decoder runs",
                hint="compile the bundle again",
            )
        return as_input(value, tensor)


def _before_decoding(graphs: Sequence[GraphSpec]) -> list[GraphSpec]:
    """The graphs that take nothing of the decoder, nor of a graph that does."""
    early = [
        graph
        for graph in graphs
        if not _DECODING & {tensor.source.partition(":")[0] for tensor in graph.inputs}
    ]
    while True:
        given = {f"output:{tensor.name}" for graph in early for tensor in graph.outputs}
        fed = [
            graph
            for graph in early
            if all(
                tensor.source in given
                for tensor in graph.inputs
                if tensor.source.startswith("output:")
            )
        ]
        if len(fed) == len(early):
            return early
        early = fed


def _ordered(graphs: Sequence[GraphSpec]) -> list[GraphSpec]:
    """Every graph after those whose outputs it takes."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for graph in graphs:
        taken = {tensor.source.removeprefix("output:") for tensor in graph.inputs}
        givers = [
            giver.name for giver in graphs if taken & {tensor.name for tensor in giver.outputs}
        ]
        sorter.add(graph.name, *givers)
    try:
        order = list(sorter.static_order())
    except CycleError as error:
        raise BundleError(
            f"graphs feed each other in a circle: {' -> '.join(error.args[1])}",
            hint="compile the bundle again",
        ) from None
    return sorted(graphs, key=lambda graph: order.index(graph.name))


def _question_rows(tensor: TensorSpec, question: Array) -> Array:
    """[1, Q, W]: all rows; or the last Q where Q is a number, zeros first if there are fewer."""
    num_rows = tensor.shape[1]
    if isinstance(num_rows, str):
        return question[None]
    rows = np.zeros((1, num_rows, question.shape[1]), question.dtype)
    kept = question[-num_rows:]
    rows[0, num_rows - len(kept) :] = kept
    return rows
