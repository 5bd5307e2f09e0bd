"""Row numbers of a shortened sequence: torch, numpy and both lowerings agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgevlm_export.lower import lower
from edgevlm_export.ops import kept_rows
from edgevlm_export.ops.kept_rows import OP as KEPT_ROWS
from edgevlm_export.plan import GraphPlan
from edgevlm_export.targets import TARGETS
from tests.export.running import captured, eager, lowered, op_graph, run, seeded, spec

TOKENS = 5


def drawn(gaps: list[int], count: int, seed: int = 0) -> dict[str, Tensor]:
    """Blocks with so many rows of text before, between and behind them."""
    random = torch.Generator().manual_seed(seed)
    blocks = len(gaps) - 1
    ends = np.cumsum(np.array(gaps) + TOKENS)
    chosen = [torch.randperm(TOKENS, generator=random)[:count].sort().values for _ in range(blocks)]
    return {
        "chosen": torch.stack(chosen) if chosen else torch.zeros(0, count, dtype=torch.int64),
        "starts": torch.tensor(ends[:-1] - TOKENS, dtype=torch.int64),
        "x": seeded(1, int(ends[-1]) - TOKENS, 3),
    }


def expected(tensors: dict[str, Tensor]) -> np.ndarray:
    arrays = {name: x.numpy() for name, x in tensors.items()}
    out: np.ndarray = KEPT_ROWS.numpy(**arrays, tokens=TOKENS)
    return out


GAPS = {
    "one block": [3, 4],
    "at both ends": [0, 2, 0],
    "side by side": [1, 0, 0, 1],
    "no text": [0, 0],
    "many": [7, 1, 0, 2, 9, 1, 12],
}


@pytest.mark.parametrize("target", ["ort", "static", "tensorrt"])
@pytest.mark.parametrize("gaps", GAPS.values(), ids=GAPS)
def test_kept_rows(target: str, gaps: list[int]) -> None:
    for count in (1, 3, TOKENS):
        tensors = drawn(gaps, count, seed=count)
        wanted = expected(tensors)
        blocks = len(gaps) - 1
        assert len(wanted) == tensors["x"].shape[1] - blocks * (TOKENS - count)
        np.testing.assert_array_equal(eager(KEPT_ROWS, tensors, tokens=TOKENS)[0], wanted)
        np.testing.assert_array_equal(lowered(KEPT_ROWS, target, tensors, tokens=TOKENS)[0], wanted)


@pytest.mark.parametrize("target", ["ort", "static", "tensorrt"])
def test_no_row_of_a_block_stays(target: str) -> None:
    tensors = drawn([2, 1, 3], 0)
    assert expected(tensors).tolist() == [0, 1, 7, 13, 14, 15]
    for out in (
        eager(KEPT_ROWS, tensors, tokens=TOKENS)[0],
        lowered(KEPT_ROWS, target, tensors, tokens=TOKENS)[0],
    ):
        assert out.tolist() == expected(tensors).tolist()


@pytest.mark.parametrize("target", ["ort", "static"])
def test_all_rows_of_blocks_stay(target: str) -> None:
    tensors = drawn([2, 1, 3], TOKENS)
    (out,) = lowered(KEPT_ROWS, target, tensors, tokens=TOKENS)
    assert out.tolist() == list(range(16))


def test_random_sequences_in_torch() -> None:
    random = np.random.default_rng(0)
    for seed in range(30):
        gaps = random.integers(0, 4, size=random.integers(2, 7)).tolist()
        tensors = drawn(gaps, int(random.integers(0, TOKENS + 1)), seed)
        out = kept_rows(tensors["chosen"], tensors["starts"], tensors["x"], TOKENS)
        np.testing.assert_array_equal(out.numpy(), expected(tensors))


@pytest.mark.parametrize("count", [0, 2])
def test_any_number_of_blocks_in_a_sequence_of_any_length(count: int) -> None:
    shapes = {"chosen": ("P", count), "starts": ("P",), "x": (1, "T", 3)}
    graph = op_graph(KEPT_ROWS, drawn([1, 1], count), shapes=shapes, tokens=TOKENS)
    model = lower(graph, TARGETS["ort"])
    # A call without pictures is one of these.
    for gaps in ([4], *GAPS.values()):
        tensors = drawn(gaps, count)
        (out,) = run(model, {name: x.numpy() for name, x in tensors.items()}).values()
        np.testing.assert_array_equal(out, expected(tensors))


class Shortened(nn.Module):
    """A sequence and its positions, shortened alike, whose rows then meet."""

    def forward(self, chosen: Tensor, starts: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        rows = kept_rows(chosen, starts, x, TOKENS)
        return x.index_select(1, rows) + positions.index_select(0, rows)


def plan(count: int, blocks: int | str, length: int | str, left: int | str) -> GraphPlan:
    return GraphPlan(
        name="shorten",
        inputs=(
            spec("chosen", (blocks, count), "int64"),
            spec("starts", (blocks,), "int64"),
            spec("x", (1, length, 3)),
            spec("positions", (length, 3)),
        ),
        outputs=(spec("y", (1, left, 3)),),
        examples={"T": 40},  # at least the rows of the three blocks that it is traced with
    )


def example(gaps: list[int], count: int) -> list[Tensor]:
    tensors = drawn(gaps, count)
    return [*tensors.values(), seeded(tensors["x"].shape[1], 3, seed=1)]


@pytest.mark.parametrize("count", [0, 2])
def test_captured_for_any_sequence(count: int) -> None:
    many = [example(gaps, count) for gaps in ([4], *GAPS.values())]
    captured(Shortened(), plan(count, "P", "T", "L"), "ort", *many, atol=0)


def test_captured_for_one_sequence() -> None:
    tensors = example(GAPS["side by side"], 2)
    length = tensors[2].shape[1]
    fixed = plan(2, 3, length, length - 3 * (TOKENS - 2))
    captured(Shortened(), fixed, "static", tensors, atol=0)


def test_the_standard_form_neither_looks_up_nor_sorts() -> None:
    graph = op_graph(KEPT_ROWS, drawn(GAPS["many"], 3), tokens=TOKENS)
    found = {node.op_type for node in lower(graph, TARGETS["static"]).graph}
    assert found <= {"Add", "Cast", "Concat", "GreaterOrEqual", "MatMul", "Reshape", "Sub"}
