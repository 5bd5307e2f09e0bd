"""Rows by their numbers: exact in every form, looked up or multiplied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgevlm_export.lower import lower
from edgevlm_export.ops import take_rows
from edgevlm_export.ops.take_rows import OP as TAKE_ROWS
from edgevlm_export.plan import GraphPlan
from edgevlm_export.targets import TARGETS
from tests.export.running import captured, eager, lowered, op_graph, run, seeded, spec

FORMS = pytest.mark.parametrize("dense", [False, True], ids=["look-up", "dense"])


def inputs(batch: int, count: int, num_rows: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Numbers of very different sizes, so that a sum with a lost bit would show."""
    x = seeded(batch, num_rows, 6, seed=seed) * 10 ** seeded(1, num_rows, 1, seed=seed + 1).mul(8)
    drawn = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(num_rows, generator=drawn)[:count] for _ in range(batch)])
    return {"x": x, "rows": rows}


@FORMS
@pytest.mark.parametrize("target", ["ort", "static", "tensorrt"])
@pytest.mark.parametrize("count", [1, 4, 11], ids=["one", "some", "all"])
def test_take_rows(target: str, count: int, dense: bool) -> None:
    tensors = inputs(1, count)
    expected = TAKE_ROWS.numpy(**{name: x.numpy() for name, x in tensors.items()})
    np.testing.assert_array_equal(eager(TAKE_ROWS, tensors, dense=dense)[0], expected)
    np.testing.assert_array_equal(lowered(TAKE_ROWS, target, tensors, dense=dense)[0], expected)


@FORMS
@pytest.mark.parametrize("target", ["ort", "static", "tensorrt"])
def test_no_row_may_be_taken(target: str, dense: bool) -> None:
    tensors = inputs(1, 0)
    assert eager(TAKE_ROWS, tensors, dense=dense)[0].shape == (1, 0, 6)
    assert lowered(TAKE_ROWS, target, tensors, dense=dense)[0].shape == (1, 0, 6)


@FORMS
def test_a_batch_of_any_size(dense: bool) -> None:
    shapes = {"x": ("B", 11, 6), "rows": ("B", 4)}
    graph = op_graph(TAKE_ROWS, inputs(2, 4), shapes=shapes, dense=dense)
    model = lower(graph, TARGETS["ort"])
    for batch in (1, 2, 5):
        arrays = {name: x.numpy() for name, x in inputs(batch, 4, seed=batch).items()}
        (out,) = run(model, arrays).values()
        np.testing.assert_array_equal(out, TAKE_ROWS.numpy(**arrays))


@FORMS
@pytest.mark.parametrize("target", ["ort", "static"])
def test_several_pictures_of_fixed_number(target: str, dense: bool) -> None:
    for count in (4,) if dense else (0, 1, 4):
        tensors = inputs(3, count)
        expected = TAKE_ROWS.numpy(**{name: x.numpy() for name, x in tensors.items()})
        np.testing.assert_array_equal(eager(TAKE_ROWS, tensors, dense=dense)[0], expected)
        (out,) = lowered(TAKE_ROWS, target, tensors, dense=dense)
        np.testing.assert_array_equal(out, expected)


class Taken(nn.Module):
    """Rows, and something made of them, so that the shape goes on."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return take_rows(x, rows, self.dense) * 2


def test_captured() -> None:
    def plan(batch: int | str) -> GraphPlan:
        given = (spec("x", (batch, 11, 6)), spec("rows", (batch, 4), "int64"))
        return GraphPlan(name="take", inputs=given, outputs=(spec("y", (batch, 4, 6)),))

    many = [tuple(inputs(batch, 4).values()) for batch in (1, 3)]
    captured(Taken(dense=False), plan("B"), "ort", *many, atol=0)
    captured(Taken(dense=True), plan(1), "static", many[0], atol=0)


def test_the_dense_form_does_not_look_up() -> None:
    model = lower(op_graph(TAKE_ROWS, inputs(1, 4), dense=True), TARGETS["static"])
    assert [node.op_type for node in model.graph] == ["Reshape", "Equal", "Cast", "MatMul"]
