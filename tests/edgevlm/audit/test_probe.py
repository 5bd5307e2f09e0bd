"""What probes say of kernels, against products computed in numpy."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgevlm.audit.probe import Kernels
from tests.edgevlm.audit.written import MICROSOFT, nbits_weights

COLUMNS, ROWS = 128, 32


def options(**entries: str) -> Any:
    made = ort.SessionOptions()
    made.log_severity_level = 4
    for name, value in entries.items():
        made.add_session_config_entry(name.replace("__", "."), value)
    return made


def nbits_product(
    x: np.ndarray, weights: np.ndarray, sizes: dict[str, int], made: Any
) -> np.ndarray:
    """X times weights [K, N] by MatMulNBits."""
    packed, scales = nbits_weights(weights, sizes["bits"], sizes["block_size"])
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain=MICROSOFT, K=COLUMNS, N=ROWS, **sizes
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(x), COLUMNS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x), ROWS])],
        [numpy_helper.from_array(packed, "b"), numpy_helper.from_array(scales, "s")],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = ort.InferenceSession(
        model.SerializeToString(), made, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


def rounded(x: np.ndarray, block: int) -> np.ndarray:
    """Rows rounded to int8, a block of columns at a time."""
    blocks = x.reshape(len(x), -1, block).astype(np.float64)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    return (np.round(blocks / step) * step).reshape(x.shape)


@pytest.mark.parametrize("packs", ["1", "0"])
@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize(("bits", "block"), [(2, 16), (2, 32), (4, 16), (4, 32), (8, 32), (8, 64)])
def test_a_probe_says_what_the_kernel_does(bits: int, block: int, level: int, packs: str) -> None:
    """Whether a product is nearer to that of rounded rows, or to that of floats, is no close call.

    Rounding rows to eight bits changes products by half a percent; float32 sums by 1e-6.
    """
    rng = np.random.default_rng(bits + block)
    x = rng.standard_normal((3, COLUMNS)).astype(np.float32)
    weights = rng.standard_normal((COLUMNS, ROWS)).astype(np.float32)
    most = 2 ** (bits - 1) - 1
    blocks = weights.T.reshape(ROWS, -1, block).astype(np.float64)
    steps = np.abs(blocks).max(axis=-1, keepdims=True) / most
    stored = (np.round(blocks / steps) * steps).reshape(ROWS, COLUMNS).T
    made = partial(options, session__disable_prepacking="0" if packs == "1" else "1")
    sizes = {"bits": bits, "block_size": block, "accuracy_level": level}
    found = nbits_product(x, weights, sizes, made())

    errors = {
        name: np.linalg.norm(found - rows @ stored) / np.linalg.norm(found)
        for name, rows in (("", x.astype(np.float64)), (f"group:{block}", rounded(x, block)))
    }
    nearest = min(errors, key=errors.__getitem__)
    assert errors[nearest] < 1e-5
    assert max(errors.values()) > 1e-3
    said = Kernels(made).nbits_rounding(bits=bits, block=block, level=level, zeros="")
    assert said == nearest


@pytest.mark.parametrize("zeros", ["int8", "float32"])
def test_zero_points_are_part_of_the_kernel(zeros: str) -> None:
    """ONNX Runtime 1.31 has no integer kernel for zero points that are floats."""
    found = Kernels(options).nbits_rounding(bits=4, block=32, level=4, zeros=zeros)
    assert found == {"int8": "group:32", "float32": ""}[zeros]


def test_saturation_is_seen() -> None:
    """Random products of full range are wrong exactly where a probe says that they may be."""
    rng = np.random.default_rng(0)
    a = rng.integers(128, 256, (4, COLUMNS)).astype(np.uint8)
    b = rng.integers(64, 128, (COLUMNS, ROWS)).astype(np.int8)
    one = numpy_helper.from_array(np.ones((), np.float32), "one")
    node = helper.make_node(
        "MatMulIntegerToFloat", ["a", "b", "one", "one"], ["y"], domain=MICROSOFT
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, a.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, ROWS])],
        [numpy_helper.from_array(b, "b"), one],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = ort.InferenceSession(
        model.SerializeToString(), options(), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {"a": a})[0]
    exact = a.astype(np.int64) @ b.astype(np.int64)
    assert Kernels(options).saturates() == bool((found != exact).any())
