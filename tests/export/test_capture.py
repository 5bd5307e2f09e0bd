"""Capture: nodes and values are named by their sites, and weights are not copied."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edgevlm_export.capture import capture
from edgevlm_export.ops import activate
from edgevlm_export.plan import GraphPlan
from edgevlm_runtime.manifest import TensorSpec
from tests.export.running import nodes, run, seeded


class Twice(nn.Module):
    """One node of its own between two of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(self.up(x))
        return out


class Whole(nn.Module):
    """A bit of everything that capture names."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Twice()
        self.conv = nn.Conv1d(8, 8, 1)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(x).index_select(1, rows)
        first, second = torch.split(x, [3, 5], dim=-1)
        return activate(first[..., 1:], "relu"), second * 2.0


def spec(name: str, shape: tuple[int | str, ...], dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


PLAN = GraphPlan(
    name="whole",
    inputs=(spec("rows_in", (1, "T", 8)), spec("wanted", ("R",), "int64")),
    outputs=(spec("first", (1, "R", 2)), spec("second", (1, "R", 5))),
    defaults={"wanted": np.array([0, -1])},
)


def test_nodes_and_values_are_named_after_modules() -> None:
    assert nodes(capture(Whole(), PLAN)) == [
        "block.up/linear: block.up/linear = linear(rows_in, block.up.weight, block.up.bias)",
        "block.up/linear1: block.up = linear(block.up/linear, block.up.weight, block.up.bias)",
        "block: block = Add(rows_in, block.up)",
        "plumbing/gather: plumbing/gather = Gather(block, wanted)",
        "plumbing/split: plumbing/split, plumbing/split:1 = Split(plumbing/gather, "
        "plumbing/int64[2](3,5))",
        "plumbing/slice: plumbing/slice = Slice(plumbing/split, plumbing/int64[1](1), "
        "plumbing/int64[1](9223372036854775807), plumbing/int64[1](2), plumbing/int64[1](1))",
        "plumbing/activate: first = activate(plumbing/slice)",
        "plumbing/mul: second = Mul(plumbing/split:1, plumbing/float32[](2.0))",
    ]


def test_interface_is_the_plan() -> None:
    graph = capture(Whole(), PLAN).graph
    assert graph.name == "whole"
    assert [value.name for value in graph.inputs] == ["rows_in", "wanted"]
    assert [value.name for value in graph.outputs] == ["first", "second"]
    assert [str(value.shape) for value in graph.inputs] == ["[1,T,8]", "[R]"]
    assert str(graph.outputs[1].shape) == "[1,R,5]"
    default = graph.initializers["wanted"].const_value
    assert default is not None
    assert default.numpy().tolist() == [0, -1]


def test_weights_are_not_copied() -> None:
    module = Whole()
    constant = capture(module, PLAN).graph.initializers["block.up.weight"].const_value
    assert constant is not None
    assert np.shares_memory(constant.numpy(), module.block.up.weight.detach().numpy())


def test_parameters_that_forward_does_not_use_are_left_out() -> None:
    names = capture(Whole(), PLAN).graph.initializers
    assert not [name for name in names if name.startswith(("conv", "unused"))]


def test_conv_without_bias_is_one_node() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2, padding=1, bias=False))
    plan = GraphPlan(
        name="conv",
        inputs=(spec("x", ("N", 3, 6, 8)),),
        outputs=(spec("y", ("N", 4, 4, 5)),),
    )
    model = capture(module, plan)
    assert nodes(model) == ["0: y = Conv(x, 0.weight)"]
    x = seeded(2, 3, 6, 8)
    expected = module(x).detach().numpy()
    # Sums of 12 products in float32.
    np.testing.assert_allclose(run(model, {"x": x.numpy()})["y"], expected, atol=1e-6, rtol=0)


def test_fixed_plan() -> None:
    fixed = PLAN.fixed(T=7)
    assert fixed.inputs[0].shape == (1, 7, 8)
    assert fixed.inputs[1].shape == ("R",)
    assert fixed.defaults == PLAN.defaults
    assert [str(v.shape) for v in capture(Whole(), fixed).graph.inputs] == ["[1,7,8]", "[R]"]
