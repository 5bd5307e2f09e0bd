"""Linear maps and logits: products in both layouts of the weight."""

from __future__ import annotations

import numpy as np
import pytest

from edgevlm_export.lower import lower
from edgevlm_export.ops.linear import OP as LINEAR
from edgevlm_export.ops.logits import OP as LOGITS
from edgevlm_export.targets import TARGETS
from tests.export.running import eager, lowered, nodes, op_graph, seeded

# Sums of 24 products of size 1.
TOLERANCE = 1e-5


@pytest.mark.parametrize("bias", [None, seeded(40, seed=2)], ids=["no bias", "bias"])
@pytest.mark.parametrize("target", ["ort", "static"])
def test_linear(target: str, bias: object) -> None:
    tensors = {"input": seeded(1, 5, 24), "weight": seeded(40, 24, seed=1), "bias": bias}
    arrays = [None if x is None else x.double().numpy() for x in tensors.values()]  # type: ignore[attr-defined]
    expected = LINEAR.numpy(*arrays)
    np.testing.assert_allclose(eager(LINEAR, tensors)[0], expected, atol=TOLERANCE)  # type: ignore[arg-type]
    (out,) = lowered(LINEAR, target, tensors, constants=["weight", "bias"])  # type: ignore[arg-type]
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", ["ort", "static"])
def test_logits(target: str) -> None:
    tensors = {"x": seeded(1, 3, 24), "table": seeded(50, 24, seed=1)}
    expected = LOGITS.numpy(*(x.double().numpy() for x in tensors.values()))
    np.testing.assert_allclose(eager(LOGITS, tensors)[0], expected, atol=TOLERANCE)
    (out,) = lowered(LOGITS, target, tensors, constants=["table"])
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)


def test_a_weight_is_transposed() -> None:
    weight = seeded(40, 24)
    graph = op_graph(LINEAR, {"input": seeded(1, 2, 24), "weight": weight}, constants=["weight"])
    model = lower(graph, TARGETS["ort"])
    assert nodes(model) == ["op: out0 = MatMul(input, weight.T)"]
    constant = model.graph.initializers["weight.T"].const_value
    assert constant is not None
    np.testing.assert_array_equal(constant.numpy(), weight.numpy().T)


def test_a_table_keeps_its_layout() -> None:
    table = seeded(40, 24)
    graph = op_graph(LOGITS, {"x": seeded(1, 2, 24), "table": table}, constants=["table"])
    assert nodes(lower(graph, TARGETS["ort"])) == ["op: out0 = FusedMatMul(x, table)"]
    assert nodes(lower(graph, TARGETS["static"])) == [
        "op/flat: op/flat = Reshape(x, plumbing/int64[2](2,24))",
        "op/gemm: op/gemm = Gemm(op/flat, table)",
        "op/rows: out0 = Reshape(op/gemm, plumbing/int64[3](1,2,40))",
    ]
