"""The largest scores: torch, numpy and both forms in a graph agree to the row, ties included."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgevlm_export.lower import lower
from edgevlm_export.ops import top_rows
from edgevlm_export.ops.top_rows import OP as TOP_ROWS
from edgevlm_export.plan import GraphPlan
from edgevlm_export.targets import TARGETS
from tests.export.running import captured, eager, lowered, nodes, op_graph, run, seeded, spec

TARGET_NAMES = ("ort", "static", "tensorrt")
FORMS = pytest.mark.parametrize("dense", [False, True], ids=["sorting", "dense"])


def equals_definition(target: str, scores: Tensor, count: int, dense: bool) -> None:
    expected = TOP_ROWS.numpy(scores.numpy(), count)
    in_torch = eager(TOP_ROWS, {"scores": scores}, count=count, dense=dense)
    in_graph = lowered(TOP_ROWS, target, {"scores": scores}, count=count, dense=dense)
    for outputs in (in_torch, in_graph):
        for out, wanted in zip(outputs, expected, strict=True):
            assert out.dtype == np.int64
            np.testing.assert_array_equal(out, wanted)


@FORMS
@pytest.mark.parametrize("target", TARGET_NAMES)
@pytest.mark.parametrize(
    "count", [0, 1, 5, 12, 13], ids=["none", "one", "some", "all but one", "all"]
)
def test_top_rows(target: str, count: int, dense: bool) -> None:
    equals_definition(target, seeded(1, 13), count, dense)


@FORMS
@pytest.mark.parametrize("target", ["ort", "static"])
@pytest.mark.parametrize("levels", [1, 3, 17])
def test_ties_keep_the_lowest_rows(target: str, levels: int, dense: bool) -> None:
    # As many scores as a picture has, and few values, as of int8: every form of TopK is met, which
    # ONNX Runtime chooses by the number of scores and of those wanted.
    for count in (1, 4, 64, 200, 289):
        scores = (seeded(1, 289, seed=count) * 100).round() % levels
        equals_definition(target, scores, count, dense)


@FORMS
@pytest.mark.parametrize("target", ["ort", "static"])
def test_infinities_are_scores(target: str, dense: bool) -> None:
    scores = torch.tensor([[0.0, -torch.inf, torch.inf, 3.0, torch.inf, -torch.inf, -0.0, 1.0]])
    for count in range(1, 9):
        equals_definition(target, scores, count, dense)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 7.0]), min_size=1, max_size=40), st.data())
def test_torch_equals_the_definition(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    scores = torch.tensor([values, values[::-1]])
    kept, rest = top_rows(scores, count)
    for out, wanted in zip((kept, rest), TOP_ROWS.numpy(scores.numpy(), count), strict=True):
        np.testing.assert_array_equal(out.numpy(), wanted)


@FORMS
def test_a_batch_of_any_size(dense: bool) -> None:
    graph = op_graph(
        TOP_ROWS, {"scores": seeded(2, 9)}, shapes={"scores": ("B", 9)}, count=4, dense=dense
    )
    model = lower(graph, TARGETS["ort"])
    for batch in (1, 2, 5):
        scores = seeded(batch, 9, seed=batch).round().numpy()
        outputs = run(model, {"scores": scores}).values()
        for out, wanted in zip(outputs, TOP_ROWS.numpy(scores, 4), strict=True):
            np.testing.assert_array_equal(out, wanted)


class Kept(nn.Module):
    """Keeps three rows, and looks at no others."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, scores: Tensor) -> Tensor:
        return top_rows(scores, 3, self.dense)[0]


class Rest(Kept):
    """Looks at the others only."""

    def forward(self, scores: Tensor) -> Tensor:
        return top_rows(scores, 3, self.dense)[1]


def plan(batch: int | str, count: int) -> GraphPlan:
    rows = spec("rows", (batch, count), "int64")
    return GraphPlan(name="top", inputs=(spec("scores", (batch, 8)),), outputs=(rows,))


@FORMS
def test_captured(dense: bool) -> None:
    many = [(seeded(batch, 8),) for batch in (1, 4)]
    captured(Kept(dense), plan("B", 3), "ort", *many, atol=0)
    captured(Rest(dense), plan(1, 5), "static", many[0], atol=0)


def test_rows_that_nobody_reads_are_not_computed() -> None:
    assert nodes(captured(Kept(dense=False), plan(1, 3), "static", atol=0)) == [
        "plumbing/top_rows/order: plumbing/top_rows/order, plumbing/top_rows/order:1 = "
        "TopK(scores, plumbing/int64[1](3))",
        "plumbing/top_rows/kept: rows, plumbing/top_rows/kept:1 = "
        "TopK(plumbing/top_rows/order:1, plumbing/int64[1](3))",
    ]


def test_the_dense_form_neither_sorts_nor_looks_up() -> None:
    scores = {"scores": seeded(1, 9)}
    model = lower(op_graph(TOP_ROWS, scores, count=4, dense=True), TARGETS["static"])
    found = {node.op_type for node in model.graph}
    assert not found & {"TopK", "Gather", "GatherND", "ScatterND", "CumSum", "NonZero"}
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.INT64}
