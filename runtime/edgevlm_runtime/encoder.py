"""Graphs that run before the decoder, in an order derived from what feeds them.

A graph whose input is `pixels` or `grid`, or the output of one that has such an input, runs once
per tile or picture; any other runs once per prompt. So a graph that wants `question_embeds` waits
for the question without anything here knowing about it. What the calls of a graph give is joined
along axis 1, the rows, in the order in which the pictures stand in the prompt.
"""

from __future__ import annotations

import itertools
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
IMAGE_POSITIONS = "image_positions"
TEXT_EMBEDS = "text_embeds"
_DECODING = {"embeds", "state", "tokens"}


class Encoder:
    """The graphs before the decoder."""

    def __init__(self, bundle: Bundle, engines: Engines) -> None:
        """Order the graphs; they are loaded when they are first called."""
        self._bundle, self._engines = bundle, engines
        self._order = _ordered(_before_decoding(bundle.variant.graphs))
        self._per_prompt: list[GraphSpec] = []
        self._per_picture: list[GraphSpec] = []
        of_pictures = {"pixels", "grid"}
        for graph in self._order:
            if of_pictures.isdisjoint(tensor.source for tensor in graph.inputs):
                self._per_prompt.append(graph)
            else:
                self._per_picture.append(graph)
                of_pictures |= {f"output:{tensor.name}" for tensor in graph.outputs}
        _check_grids(self._per_picture)

    def load(self) -> None:
        """Load all graphs but those that are for one of several picture grids."""
        for graph in self._order:
            if graph.grid is None:
                self._engines.open(graph)

    def run(
        self,
        pictures: Sequence[PreparedImage],
        question: Array,
        weights: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """The named outputs of all graphs, for `question` [Q, W], the text rows of the prompt.

        `weights` are those of these rows [Q], by kind.
        """
        prompt: dict[str, Array] = {"question_embeds": question[None]}
        for name, rows in (weights or {}).items():
            prompt[f"question_weights:{name}"] = rows[None]
        for graph in self._per_prompt:
            prompt |= self._call(graph, prompt)
        calls = []
        for picture in pictures:
            for feed in picture.feeds:
                values: dict[str, Array] = {**prompt, **feed}
                for graph in self._serving(picture.layout.grid):
                    values |= self._call(graph, values)
                calls.append(values)
        outputs = {}
        for source in calls[0] if calls else prompt:
            kind, _, name = source.partition(":")
            if kind == "output" and source in prompt:
                outputs[name] = prompt[source]
            elif kind == "output":
                outputs[name] = np.concatenate([values[source] for values in calls], axis=1)
        return outputs

    def _serving(self, grid: tuple[int, int] | None) -> list[GraphSpec]:
        """The graphs for a picture of a grid, in order."""
        graphs = self._per_picture
        serving = [graph for graph in graphs if graph.grid is None or graph.grid == grid]
        if graphs and not serving:
            grids = ", ".join(f"{graph.grid[0]}x{graph.grid[1]}" for graph in graphs if graph.grid)
            raise InputError(
                f"no vision graph for a picture grid of {grid}", hint=f"the bundle has {grids}"
            )
        return serving

    def _call(self, graph: GraphSpec, values: Mapping[str, Array]) -> dict[str, Array]:
        """Run a graph on values by source; what it gives, by source too."""
        inputs = {tensor.name: self._input(graph, tensor, values) for tensor in graph.inputs}
        outputs: dict[str, Array | None] = {tensor.name: None for tensor in graph.outputs}
        made = self._engines.open(graph).bind(inputs, outputs).run()
        return {f"output:{name}": array for name, array in made.items()}

    def _input(self, graph: GraphSpec, tensor: TensorSpec, values: Mapping[str, Array]) -> Array:
        """The value of an input, by its source."""
        kind, _, name = tensor.source.partition(":")
        if kind == "constant":
            value = read_array(self._bundle, name)
        elif tensor.source in values:
            value = values[tensor.source]
        else:
            raise BundleError(
                f"input {tensor.name!r} of graph {graph.name!r} has source {tensor.source!r}, "
                "which is not there before the decoder runs",
                hint="compile the bundle again",
            )
        if kind in ("question_embeds", "question_weights"):
            value = question_rows(tensor, value)
        return as_input(value, tensor)


def _check_grids(graphs: Sequence[GraphSpec]) -> None:
    """What pictures of different grids give is joined, so it has the same names."""
    given: dict[tuple[int, int], set[str]] = {}
    for graph in graphs:
        if graph.grid is not None:
            given.setdefault(graph.grid, set()).update(tensor.name for tensor in graph.outputs)
    for (grid, names), (other, others) in itertools.pairwise(given.items()):
        if names != others:
            raise BundleError(
                f"graphs for pictures of grid {list(grid)} give {sorted(names)}, "
                f"those of grid {list(other)} give {sorted(others)}",
                hint="compile the bundle again",
            )


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


def question_rows(tensor: TensorSpec, question: Array) -> Array:
    """[1, Q, ..]: all rows; or the last Q where Q is a number, zeros first if there are fewer."""
    num_rows = tensor.shape[1]
    if isinstance(num_rows, str):
        return question
    kept = question[:, -num_rows:]
    missing = np.zeros((1, num_rows - kept.shape[1], *kept.shape[2:]), kept.dtype)
    return np.concatenate([missing, kept], axis=1)
