"""A reduction of visual rows between the layers of a toy step graph, and the same by numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.runtime.onnx_graph import OnnxGraph

Array = NDArray[Any]

# T rows of a call, P picture groups of N tokens, W width


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """Of the `tokens` rows of every picture group, `dropped` never reach the layers of `group`.

    It drops those that are least like what is asked: the sum of the question's rows and the last
    row of the call.
    """

    group: str
    tokens: int
    dropped: int
    pictures: int | str = "P"


def kept_rows(graph: OnnxGraph, x: str, rows: int | str, reduction: Reduction) -> tuple[str, str]:
    """The rows of x [1, T, W] that stay, and for each row of x its place among them."""
    begins = graph.input("picture_rows", "int64", (reduction.pictures,), "picture_rows")
    weights = graph.input("row_weights", "float32", (1, rows), "row_weights:question")
    last = graph.input("last_row", "int64", (1,), "last_row")
    asked = graph.node(
        "Add", graph.node("MatMul", weights, x), graph.node("Gather", x, last, axis=1)
    )
    alike = graph.node("Mul", x, asked)
    likeness_T = graph.node("ReduceSum", alike, graph.const(np.array([0, 2])), keepdims=0)
    begins_P1 = graph.node("Unsqueeze", begins, graph.const(np.array([1])))
    places_PN = graph.node("Add", begins_P1, graph.const(np.arange(reduction.tokens)))
    graph.node(
        "TopK",
        graph.node("Gather", likeness_T, places_PN),
        graph.const(np.array([reduction.dropped])),
        outputs=("least", "least_like"),
        axis=1,
        largest=0,
    )
    flat = graph.const(np.array([-1]))
    gone = graph.node("Reshape", graph.node("Add", begins_P1, "least_like"), flat)
    stays = graph.node(
        "ScatterElements",
        graph.filled(graph.node("Shape", likeness_T), 1),
        gone,
        graph.filled(graph.node("Shape", gone), 0),
    )
    kept = graph.node("Reshape", graph.node("NonZero", stays), flat)
    counted = graph.node("CumSum", stays, graph.const(np.array(0)))
    return kept, graph.node("Sub", counted, graph.const(np.array(1)))


def dropped_rows(
    x: Array, begins: Sequence[int] | Array, weights: Array, reduction: Reduction
) -> list[int]:
    """The rows of x [T, W] that do not stay."""
    likeness = x @ (weights @ x + x[-1])
    gone: list[int] = []
    for begin in begins:
        of_group = likeness[begin : begin + reduction.tokens]
        order = of_group.argsort()
        # The choice is clear, so that float32 makes the same.
        assert np.diff(of_group[order])[reduction.dropped - 1] > 1e-3
        gone += [int(begin + index) for index in order[: reduction.dropped]]
    return gone
