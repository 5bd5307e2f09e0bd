"""Rows that cover the most: torch, numpy and the unrolled graph agree where sums are apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgevlm_export.lower import lower
from edgevlm_export.ops import cover_rows
from edgevlm_export.ops.cover_rows import OP as COVER_ROWS
from edgevlm_export.plan import GraphPlan
from edgevlm_export.targets import TARGETS
from tests.export.running import captured, eager, lowered, op_graph, run, seeded, spec

# Sums of tens of numbers of size 1 in float32 are off by less: the best row is the best in each.
MARGIN = 1e-5


def drawn(batch: int, num_rows: int, things: int, seed: int = 0) -> dict[str, Tensor]:
    """Gains of 0 to 1 and a bonus, float32."""
    random = torch.Generator().manual_seed(seed)
    gains = torch.rand((batch, num_rows, things), generator=random)
    return {"gains": gains, "bonus": torch.rand((batch, num_rows), generator=random)}


def margin(gains: np.ndarray, bonus: np.ndarray | None, count: int) -> float:
    """The least lead of a picked row over the next best one, in float64.

    Where nothing is left to cover, sums are 0 in every engine, and no lead is needed.
    """
    least = np.inf
    for picture, values in enumerate(gains.astype(np.float64)):
        sums = np.zeros(len(values)) if bonus is None else bonus[picture].astype(np.float64)
        covered, extra = np.zeros(values.shape[1]), sums
        for _ in range(count):
            sums = np.maximum(values - covered, 0).sum(axis=1) + extra
            best = int(np.argmax(sums))
            second = max(np.delete(sums, best), default=-np.inf)
            if sums[best] != 0 or second != 0:
                least = min(least, sums[best] - second)
            covered = np.maximum(covered, values[best])
            extra = np.where(np.arange(len(values)) == best, -np.inf, extra)
    return float(least)


def equals_definition(target: str, tensors: dict[str, Tensor], count: int) -> np.ndarray:
    bonus = tensors["bonus"].numpy() if "bonus" in tensors else None
    gains = tensors["gains"].numpy()
    assert margin(gains, bonus, count) > MARGIN
    expected: np.ndarray = COVER_ROWS.numpy(gains, bonus, count)
    np.testing.assert_array_equal(eager(COVER_ROWS, tensors, count=count)[0], expected)
    np.testing.assert_array_equal(lowered(COVER_ROWS, target, tensors, count=count)[0], expected)
    return expected


@pytest.mark.parametrize("target", ["ort", "static", "tensorrt"])
@pytest.mark.parametrize("with_bonus", [False, True], ids=["gains only", "bonus"])
@pytest.mark.parametrize("count", [1, 2, 6, 14], ids=["one", "two", "some", "all"])
def test_cover_rows(target: str, with_bonus: bool, count: int) -> None:
    tensors = drawn(1, 14, 23, seed=count)
    if not with_bonus:
        del tensors["bonus"]
    equals_definition(target, tensors, count)


def whole_numbers(num_rows: int, seed: int, levels: int) -> dict[str, Tensor]:
    """Gains and a bonus whose sums are exact in any order, with many ties."""
    tensors = drawn(1, num_rows, 9, seed=seed)
    return {name: (x * levels).floor() for name, x in tensors.items()}


@pytest.mark.parametrize("target", ["ort", "static"])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_ties_pick_the_lowest_rows(target: str, levels: int) -> None:
    for count in (1, 10, 33):
        tensors = whole_numbers(33, count, levels)
        gains, bonus = (tensors[name].numpy() for name in ("gains", "bonus"))
        expected = COVER_ROWS.numpy(gains, bonus, count)
        np.testing.assert_array_equal(eager(COVER_ROWS, tensors, count=count)[0], expected)
        (out,) = lowered(COVER_ROWS, target, tensors, count=count)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("target", ["ort", "static"])
def test_nothing_to_cover(target: str) -> None:
    for value in (0.0, -1.0):
        tensors = {"gains": torch.full((1, 7, 3), value)}
        assert eager(COVER_ROWS, tensors, count=4)[0].tolist() == [[0, 1, 2, 3]]
        assert lowered(COVER_ROWS, target, tensors, count=4)[0].tolist() == [[0, 1, 2, 3]]


def test_a_row_is_picked_for_what_the_others_leave() -> None:
    gains = torch.tensor([[[5.0, 4.0, 0.0], [4.0, 5.0, 0.0], [0.0, 0.0, 2.0], [0.0, 6.0, 0.0]]])
    # 0 and 1 cover 9 each, and 0 is lower; then 3 adds 2, 1 adds 1 and 2 adds 2: 2 is lower.
    assert [cover_rows(gains, None, count).tolist() for count in (1, 2, 3)] == [
        [[0]],
        [[0, 2]],
        [[0, 2, 3]],
    ]
    bonus = torch.tensor([[0.0, 1.0, 0.0, 0.5]])
    # With it 1 covers 10, then 2 adds 2 and 3 adds 1.5.
    assert cover_rows(gains, bonus, 2).tolist() == [[1, 2]]


def test_a_negative_bonus_is_no_ban() -> None:
    gains = torch.zeros(1, 3, 2)
    bonus = torch.tensor([[-1e6, -2.0, -1e9]])
    assert cover_rows(gains, bonus, 2).tolist() == [[0, 1]]
    out = lowered(COVER_ROWS, "static", {"gains": gains, "bonus": bonus}, count=3)[0]
    assert out.tolist() == [[0, 1, 2]]


def test_the_size_it_is_for() -> None:
    # 64 of 576 rows over 640 things. Leads are small here, but sums are of what is left, and are
    # compared to the last bit but a few.
    tensors = drawn(1, 576, 640)
    del tensors["bonus"]
    wanted = eager(COVER_ROWS, tensors, count=64)[0]
    for target in ("ort", "static"):
        np.testing.assert_array_equal(lowered(COVER_ROWS, target, tensors, count=64)[0], wanted)


@pytest.mark.parametrize("with_bonus", [False, True], ids=["gains only", "bonus"])
def test_a_batch_of_any_size(with_bonus: bool) -> None:
    names = ("gains", "bonus") if with_bonus else ("gains",)
    shapes = {"gains": ("B", 12, 17), "bonus": ("B", 12)}
    graph = op_graph(
        COVER_ROWS,
        {name: drawn(2, 12, 17)[name] for name in names},
        shapes={name: shapes[name] for name in names},
        count=5,
    )
    model = lower(graph, TARGETS["ort"])
    for batch in (1, 2, 5):
        arrays = {name: drawn(batch, 12, 17, seed=batch)[name].numpy() for name in names}
        assert margin(arrays["gains"], arrays.get("bonus"), 5) > MARGIN
        (out,) = run(model, arrays).values()
        np.testing.assert_array_equal(
            out, COVER_ROWS.numpy(arrays["gains"], arrays.get("bonus"), 5)
        )


class Covered(nn.Module):
    """Rows of a picture that look like most of the others."""

    def forward(self, x: Tensor) -> Tensor:
        return cover_rows(torch.relu(x @ x.transpose(1, 2)), None, 4)


def test_captured() -> None:
    def plan(batch: int | str) -> GraphPlan:
        rows = spec("rows", (batch, 4), "int64")
        return GraphPlan(name="cover", inputs=(spec("x", (batch, 9, 5)),), outputs=(rows,))

    many = [(seeded(batch, 9, 5),) for batch in (1, 3)]
    for (x,) in many:
        assert margin(torch.relu(x @ x.mT).numpy(), None, 4) > MARGIN
    captured(Covered(), plan("B"), "ort", *many, atol=0)
    for x in many:
        captured(Covered(), plan(len(x[0])), "static", x, atol=0)
