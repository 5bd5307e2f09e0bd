"""Quantized projections: eager and lowered, against a slow definition in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgevlm_export.errors import ExportError
from edgevlm_export.lower import lower
from edgevlm_export.ops.quant_linear import OP, numpy_float8
from edgevlm_export.targets import TARGETS
from tests.export.running import eager, lowered, nodes, op_graph, seeded

N, K = 24, 80
CONSTANTS = ["weight", "scale", "zero", "bias", "x_scale", "x_zero"]
# Sums of 80 products of size 1 in float32.
TOLERANCE = 2e-5


def case(
    bits: int = 8,
    group_size: int = 0,
    *,
    x: str = "",
    scales: str = "",
    zero: bool = False,
    bias: bool = True,
    most: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and attributes of a projection; `most` bounds the integers."""
    random = np.random.default_rng(0)
    groups = -(-K // group_size) if group_size else 1
    limit = 2 ** (bits - 1)
    values = random.integers(-limit, limit, (N, K))
    if most is not None:
        values = values.clip(-most - 1, most)
    storage = np.int16 if bits > 8 else np.int8
    static = scales == "static"
    tensors = {
        "x": seeded(1, 5, K, seed=3),
        "weight": torch.from_numpy(values.astype(storage)),
        "scale": torch.from_numpy(random.uniform(0.5, 1.5, (N, groups)).astype(np.float32) / limit),
        "zero": torch.from_numpy(random.integers(-3, 4, (N, groups)).astype(storage))
        if zero
        else None,
        "bias": seeded(N, seed=4) if bias else None,
        "x_scale": torch.tensor(4.0 / 2 ** (15 if x == "int16" else 7)) if static else None,
        "x_zero": torch.tensor(-5, dtype=torch.int32) if static else None,
    }
    return tensors, {"bits": bits, "group_size": group_size, "x_dtype": x, "x_scales": scales}


def reference(tensors: dict[str, Any], attributes: dict[str, Any]) -> np.ndarray:
    arrays = [None if value is None else value.numpy() for value in tensors.values()]
    return np.asarray(OP.numpy(*arrays, **attributes))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zero": True},
        {"bias": False},
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": 32, "zero": True},
        {"bits": 16},
        {"x": "int8", "scales": "token"},
        {"x": "int8", "scales": "tensor"},
        {"x": "int8", "scales": "block", "bits": 4, "group_size": 32},
        {"x": "int8", "scales": "static"},
        {"x": "int16", "scales": "static"},
    ],
    ids=str,
)
def test_eager_is_the_definition(options: dict[str, Any]) -> None:
    tensors, attributes = case(**options)
    np.testing.assert_allclose(
        eager(OP, tensors, **attributes)[0], reference(tensors, attributes), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ("MatMulNBits", {}),
        ("MatMulNBits", {"x": "int16", "scales": "static"}),
        ("MatMulNBits", {"bits": 4, "group_size": 32}),
        ("MatMulNBits", {"bits": 4, "group_size": 32, "zero": True}),
        ("MatMulNBits", {"bits": 8, "group_size": 32, "zero": True}),
        ("MatMulNBits", {"x": "int8", "scales": "block", "bits": 4, "group_size": 32}),
        ("MatMulIntegerToFloat", {"x": "int8", "scales": "token", "most": 63}),
        ("MatMulIntegerToFloat", {"x": "int8", "scales": "token", "bits": 4}),
        ("MatMulIntegerToFloat", {"x": "int8", "scales": "static", "most": 63, "zero": True}),
        ("DynamicQuantizeMatMul", {"x": "int8", "scales": "tensor", "most": 63}),
    ],
    ids=str,
)
def test_fused_kernels(kernel: str, options: dict[str, Any]) -> None:
    tensors, attributes = case(**options)
    expected = reference(tensors, attributes)
    (out,) = lowered(OP, "ort", tensors, constants=CONSTANTS, dynamic=["x"], **attributes)
    # int16 activations stay float there; a block's scale is kept in float32 by the kernel.
    atol = 5e-4 if options.get("x") == "int16" else 2e-4 if "block" in options.values() else 2e-5
    np.testing.assert_allclose(out, expected, atol=atol, rtol=0)
    graph = lower(
        op_graph(OP, tensors, constants=CONSTANTS, dynamic=["x"], **attributes), TARGETS["ort"]
    )
    assert kernel in {node.op_type for node in graph.graph}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zero": True},
        {"bits": 16},
        {"bits": 4},
        {"bits": 4, "group_size": 16, "zero": True},
        {"x": "int8", "scales": "static", "most": 63},
        {"x": "int16", "scales": "static"},
        {"x": "int16", "scales": "static", "bits": 16},
    ],
    ids=str,
)
def test_standard_ops(options: dict[str, Any]) -> None:
    tensors, attributes = case(**options)
    (out,) = lowered(OP, "static", tensors, constants=CONSTANTS, **attributes)
    np.testing.assert_allclose(out, reference(tensors, attributes), atol=5e-5, rtol=0)


def test_a_row_does_not_see_its_neighbours() -> None:
    tensors, attributes = case(x="int8", scales="token", most=63)
    loud = tensors["x"].clone()
    loud[0, 1:] *= 50
    quiet = lowered(OP, "ort", tensors, constants=CONSTANTS, dynamic=["x"], **attributes)[0]
    (beside,) = lowered(
        OP, "ort", {**tensors, "x": loud}, constants=CONSTANTS, dynamic=["x"], **attributes
    )
    np.testing.assert_array_equal(beside[0, 0], quiet[0, 0])
    (alone,) = lowered(
        OP,
        "ort",
        {**tensors, "x": tensors["x"][:, :1]},
        constants=CONSTANTS,
        dynamic=["x"],
        **attributes,
    )
    np.testing.assert_array_equal(alone[0, 0], quiet[0, 0])


def test_a_row_of_zeros_stays_zero() -> None:
    tensors, attributes = case(x="int8", scales="token", bias=False, most=63)
    tensors["x"] = torch.zeros(1, 2, K)
    (out,) = lowered(OP, "ort", tensors, constants=CONSTANTS, dynamic=["x"], **attributes)
    np.testing.assert_array_equal(out, np.zeros((1, 2, N)))


def test_float8_is_what_torch_rounds_to() -> None:
    x = torch.cat([torch.linspace(-500, 500, 4001), torch.logspace(-12, 3, 2000)])
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        most = float(torch.finfo(dtype).max)
        want = x.clamp(-most, most).to(dtype).float().numpy()
        np.testing.assert_array_equal(numpy_float8(x.numpy(), str(dtype).split(".")[1]), want)


def test_a_scheme_that_no_kernel_does_is_an_error() -> None:
    tensors, attributes = case(bits=16)
    graph = op_graph(OP, tensors, constants=CONSTANTS, dynamic=["x"], **attributes)
    with pytest.raises(ExportError) as error:
        lower(graph, TARGETS["ort"])
    assert str(error.value) == (
        "graph: 'op' multiplies int16 weights by activations as they are, which no fused kernel "
        "does\n  hint: choose another scheme, or a target of standard ops"
    )


def test_nodes_of_a_row_wise_product() -> None:
    tensors, attributes = case(x="int8", scales="token")
    graph = op_graph(OP, tensors, constants=CONSTANTS, dynamic=["x"], **attributes)
    assert isinstance(graph, ir.Model)
    assert [line.split(" = ")[1].split("(")[0] for line in nodes(lower(graph, TARGETS["ort"]))] == [
        "Abs",
        "ReduceMax",
        "Mul",
        "Max",
        "Div",
        "QuantizeLinear",
        "MatMulIntegerToFloat",
        "Mul",
        "Add",
    ]
