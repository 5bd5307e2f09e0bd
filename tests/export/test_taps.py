"""Taps: values inside a written graph become outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgevlm_export.errors import ExportError
from edgevlm_export.taps import record_tap, tapped_sites, with_outputs
from edgevlm_export.write import WeightFile, write
from tests.export.running import parsed, seeded

NUMBERS = ", ".join(str(i / 256) for i in range(512))
X = seeded(2, 16).numpy()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Site `a` is whole; `b` lost its bias to `c`, whose output is the graph's."""
    model = parsed(f"""<ir_version: 10, opset_import: ["" : 19, "com.microsoft" : 1]>
        g (float[2,16] x) => (float[2,32] out)
        <float[16,32] weight = {{{NUMBERS}}}, float[32] bias = {{{", ".join(["0.5"] * 32)}}}>
        {{ a = Relu(x) product = MatMul(a, weight) out = com.microsoft.BiasGelu(product, bias) }}
    """)
    for node, name in zip(model.graph, ("a", "b/matmul", "c"), strict=True):
        node.name = name
    made = model.graph[1].outputs[0]
    made.name, made.type = "b/matmul", ir.TensorType(ir.DataType.FLOAT)
    model.graph[0].outputs[0].type = made.type
    record_tap(model, "b", ["b/matmul"], "bias")
    record_tap(model, "c", ["out"])
    with WeightFile(tmp_path / "weights.bin") as weights:
        write(model, tmp_path / "graph.onnx", weights)
    return tmp_path / "graph.onnx"


def run_file(path: Path) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": X}), strict=True))


def test_sites_in_the_order_of_the_graph(path: Path) -> None:
    assert tapped_sites(ir.load(path)) == ("a", "b", "c")


@pytest.mark.parametrize("place", ["tapped.onnx", "elsewhere/tapped.onnx"])
def test_values_of_sites_become_outputs(path: Path, place: str) -> None:
    copy = path.parent / place
    copy.parent.mkdir(exist_ok=True)
    with_outputs(path, ["a", "b", "b/matmul", "c"], copy)
    values = run_file(copy)
    weight = (np.arange(512) / 256).reshape(16, 32).astype(np.float32)
    assert list(values) == ["out", "a", "b", "b/matmul", "c"]
    np.testing.assert_array_equal(values["a"], np.maximum(X, 0))
    # Sums of 16 products of size 2.
    np.testing.assert_allclose(values["b/matmul"], values["a"] @ weight, atol=1e-5, rtol=0)
    np.testing.assert_allclose(values["b"], values["b/matmul"] + 0.5, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(values["c"], values["out"])
    np.testing.assert_array_equal(values["out"], run_file(path)["out"])
    assert (copy.parent / "weights.bin").stat().st_ino == (
        path.parent / "weights.bin"
    ).stat().st_ino


def test_an_unknown_name(path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        with_outputs(path, ["d"], path.parent / "tapped.onnx")
    assert str(caught.value) == (
        "g: no value 'd' in graph.onnx\n"
        "  hint: name a site, or a value of the graph as `edgevlm inspect` lists them"
    )
    assert not (path.parent / "tapped.onnx").exists()
