"""Rows far from each other: torch, numpy and the unrolled graph agree to the row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgevlm_export.lower import lower
from edgevlm_export.ops import spread_rows
from edgevlm_export.ops.spread_rows import OP as SPREAD_ROWS
from edgevlm_export.plan import GraphPlan
from edgevlm_export.targets import TARGETS
from tests.export.running import captured, eager, lowered, op_graph, run, seeded, spec


def distances(batch: int, num_rows: int, seed: int = 0) -> Tensor:
    """Cosine distances of random rows, with numbers on the diagonal that must not matter."""
    rows = nn.functional.normalize(seeded(batch, num_rows, 5, seed=seed), dim=-1)
    return 1 - rows @ rows.mT + torch.eye(num_rows) * 99


def equals_definition(target: str, distance: Tensor, count: int) -> None:
    expected = SPREAD_ROWS.numpy(distance.numpy(), count)
    in_torch = eager(SPREAD_ROWS, {"distance": distance}, count=count)
    in_graph = lowered(SPREAD_ROWS, target, {"distance": distance}, count=count)
    # Nothing is added up: rows are equal however close the distances are.
    np.testing.assert_array_equal(in_torch[0], expected)
    np.testing.assert_array_equal(in_graph[0], expected)


@pytest.mark.parametrize("target", ["ort", "static", "tensorrt"])
@pytest.mark.parametrize("count", [1, 2, 7, 16], ids=["one", "two", "some", "all"])
def test_spread_rows(target: str, count: int) -> None:
    equals_definition(target, distances(1, 16, seed=count), count)


@pytest.mark.parametrize("target", ["ort", "static"])
@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_equal_distances_give_the_lowest_rows(target: str, value: float) -> None:
    for count in (1, 4, 9):
        distance = torch.full((1, 9, 9), value)
        equals_definition(target, distance, count)
        assert eager(SPREAD_ROWS, {"distance": distance}, count=count)[0].tolist() == [
            list(range(count))
        ]


@pytest.mark.parametrize("target", ["ort", "static"])
def test_few_different_distances(target: str) -> None:
    for seed in range(4):
        distance = (distances(1, 65, seed=seed) * 2).round()
        equals_definition(target, (distance + distance.mT) / 2, 20)


def test_one_row() -> None:
    for target in ("ort", "static"):
        equals_definition(target, torch.zeros(1, 1, 1), 1)


def test_a_line_of_points() -> None:
    points = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 30.0])
    distance = (points[:, None] - points).abs()[None]
    # The loneliest point is 30; 0 is farthest from it, and 10 or 11 from both: 11 by one.
    assert [spread_rows(distance, count).tolist()[0] for count in (1, 2, 3)] == [
        [5],
        [0, 5],
        [0, 4, 5],
    ]


def test_random_sizes_in_torch() -> None:
    drawn = np.random.default_rng(0)
    for seed in range(20):
        num_rows = int(drawn.integers(1, 12))
        count = int(drawn.integers(1, num_rows + 1))
        distance = (distances(2, num_rows, seed) * drawn.integers(1, 4)).round()
        expected = SPREAD_ROWS.numpy(distance.numpy(), count)
        np.testing.assert_array_equal(spread_rows(distance, count).numpy(), expected)


def test_a_batch_of_any_size() -> None:
    shapes = {"distance": ("B", 12, 12)}
    graph = op_graph(SPREAD_ROWS, {"distance": distances(2, 12)}, shapes=shapes, count=5)
    model = lower(graph, TARGETS["ort"])
    for batch in (1, 2, 5):
        distance = distances(batch, 12, seed=batch).numpy()
        (out,) = run(model, {"distance": distance}).values()
        np.testing.assert_array_equal(out, SPREAD_ROWS.numpy(distance, 5))


class Spread(nn.Module):
    """Rows of a picture, far from each other."""

    def forward(self, x: Tensor) -> Tensor:
        return spread_rows(1 - x @ x.transpose(1, 2), 4)


def test_captured() -> None:
    def plan(batch: int | str) -> GraphPlan:
        rows = spec("rows", (batch, 4), "int64")
        return GraphPlan(name="spread", inputs=(spec("x", (batch, 9, 5)),), outputs=(rows,))

    many = [(nn.functional.normalize(seeded(batch, 9, 5), dim=-1),) for batch in (1, 3)]
    captured(Spread(), plan("B"), "ort", *many, atol=0)
    for x in many:
        captured(Spread(), plan(len(x[0])), "static", x, atol=0)


def test_a_step_is_three_nodes() -> None:
    def size(target: str, count: int) -> int:
        graph = op_graph(SPREAD_ROWS, {"distance": distances(1, 12)}, count=count)
        return len(lower(graph, TARGETS[target]).graph)

    assert [size(target, 9) - size(target, 8) for target in ("ort", "static")] == [3, 3]
