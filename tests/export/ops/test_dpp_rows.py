"""Rows that span the most: torch, numpy and the unrolled graph agree to the row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgevlm_export.lower import lower
from edgevlm_export.ops import dpp_rows
from edgevlm_export.ops.dpp_rows import OP as DPP_ROWS
from edgevlm_export.plan import GraphPlan
from edgevlm_export.targets import TARGETS
from tests.export.running import captured, eager, lowered, op_graph, run, seeded, spec


def kernels(batch: int, num_rows: int, width: int = 40, seed: int = 0) -> Tensor:
    """Cosines of random rows, times how much each of two matters."""
    rows = nn.functional.normalize(seeded(batch, num_rows, width, seed=seed), dim=-1)
    matters = torch.rand(batch, num_rows, 1, generator=torch.Generator().manual_seed(seed))
    return (rows * matters) @ (rows * matters).mT


def equals_definition(target: str, kernel: Tensor, count: int) -> None:
    expected = DPP_ROWS.numpy(kernel.numpy(), count)
    in_torch = eager(DPP_ROWS, {"kernel": kernel}, count=count)
    in_graph = lowered(DPP_ROWS, target, {"kernel": kernel}, count=count)
    # Of random rows no two residuals are so near that float32 takes one for the other.
    np.testing.assert_array_equal(in_torch[0], expected)
    np.testing.assert_array_equal(in_graph[0], expected)


@pytest.mark.parametrize("target", ["ort", "static", "tensorrt"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16], ids=["one", "two", "three", "some", "all"])
def test_dpp_rows(target: str, count: int) -> None:
    equals_definition(target, kernels(1, 16, seed=count), count)


@pytest.mark.parametrize("target", ["ort", "static"])
def test_several_pictures_of_fixed_number(target: str) -> None:
    equals_definition(target, kernels(3, 14, seed=4), 6)


@pytest.mark.parametrize("seed", range(4))
def test_many_rows(seed: int) -> None:
    equals_definition("ort", kernels(1, 120, 100, seed=seed), 60)


@pytest.mark.parametrize("target", ["ort", "static"])
@pytest.mark.parametrize("value", [0.0, 1e-20, 1.0, 4e6])
def test_equal_rows_are_picked_from_the_lowest(target: str, value: float) -> None:
    # The kernel of rows that are all the same, and of rows that have nothing in common.
    for kernel in (torch.full((1, 9, 9), value), torch.eye(9)[None] * value):
        for count in (1, 4, 9):
            equals_definition(target, kernel, count)
            picked = eager(DPP_ROWS, {"kernel": kernel}, count=count)[0].tolist()
            assert picked == [list(range(count))]


@pytest.mark.parametrize("target", ["ort", "static"])
def test_a_kernel_that_is_explained_has_nothing_left(target: str) -> None:
    # Rows in three dimensions: three are picked by what they add, the others from the lowest.
    kernel = kernels(1, 12, 3, seed=5)
    three = DPP_ROWS.numpy(kernel.numpy(), 3)[0].tolist()
    rest = [row for row in range(12) if row not in three]
    for count in (3, 4, 8):
        equals_definition(target, kernel, count)
        picked = eager(DPP_ROWS, {"kernel": kernel}, count=count)[0].tolist()
        assert picked == [sorted([*three, *rest[: count - 3]])]


def test_twins_are_picked_last() -> None:
    rows = nn.functional.normalize(seeded(1, 8, 20), dim=-1).repeat_interleave(2, dim=1)
    kernel = rows @ rows.mT
    for count in range(1, 9):
        picked = dpp_rows(kernel, count)[0]
        assert picked.div(2, rounding_mode="floor").unique().numel() == count
        assert (picked % 2 == 0).all()


def test_determinants_grow_most() -> None:
    kernel = kernels(1, 14, 14, seed=3)
    values, picked = kernel[0].double().numpy(), []
    for count in range(1, 15):
        (new,) = set(dpp_rows(kernel, count)[0].tolist()) - set(picked)
        left = [row for row in range(14) if row not in picked]
        grown = [np.linalg.det(values[np.ix_([*picked, r], [*picked, r])]) for r in left]
        assert new == left[int(np.argmax(grown))]
        picked.append(new)


def test_a_batch_of_any_size() -> None:
    shapes = {"kernel": ("B", 12, 12)}
    graph = op_graph(DPP_ROWS, {"kernel": kernels(2, 12)}, shapes=shapes, count=5)
    model = lower(graph, TARGETS["ort"])
    for batch in (1, 2, 5):
        kernel = kernels(batch, 12, seed=batch)
        (out,) = run(model, {"kernel": kernel.numpy()}).values()
        np.testing.assert_array_equal(out, DPP_ROWS.numpy(kernel.numpy(), 5))
        np.testing.assert_array_equal(out, dpp_rows(kernel, 5).numpy())


class Spanning(nn.Module):
    """Rows of a picture that span the most."""

    def forward(self, x: Tensor) -> Tensor:
        return dpp_rows(x @ x.transpose(1, 2), 4)


def test_captured() -> None:
    def plan(batch: int | str) -> GraphPlan:
        rows = spec("rows", (batch, 4), "int64")
        return GraphPlan(name="span", inputs=(spec("x", (batch, 9, 15)),), outputs=(rows,))

    many = [(seeded(batch, 9, 15),) for batch in (1, 3)]
    captured(Spanning(), plan("B"), "ort", *many, atol=0)
    captured(Spanning(), plan(1), "static", many[0], atol=0)


def test_nodes_of_a_step() -> None:
    def size(target: str, count: int) -> int:
        graph = op_graph(DPP_ROWS, {"kernel": kernels(1, 12)}, count=count)
        return len(lower(graph, TARGETS[target]).graph)

    assert [size(target, 9) - size(target, 8) for target in ("ort", "static")] == [19, 19]
