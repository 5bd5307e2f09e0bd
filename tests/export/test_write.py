"""Written graphs: every weight once, checked, durable, the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgevlm_export.errors import ExportError
from edgevlm_export.write import PAGE, WeightFile, write
from tests.export.running import parsed, run, seeded


def graph(weight: np.ndarray, rows: int = 2, small: float = 1.0) -> ir.Model:
    """Relu(x @ weight + small), the weight too large to stay in the graph file."""
    size = weight.shape[1]
    model = parsed(f"""<ir_version: 10, opset_import: ["" : 19]>
        step_{rows} (float[{rows},{weight.shape[0]}] x) => (float[{rows},{size}] c)
        <float[1] small = {{{small}}}, float weight = {{0}}>
        {{ a = MatMul(x, weight) b = Add(a, small) c = Relu(b) }}""")
    value = model.graph.initializers["weight"]
    value.const_value = ir.tensor(weight, name="weight")
    value.shape = ir.Shape(weight.shape)
    return model


WEIGHT = seeded(48, 64).numpy()


def run_file(path: Path, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    out: np.ndarray = session.run(None, {"x": x})[0]
    return out


def place(path: Path) -> dict[str, str]:
    """Where a graph says that its weight is."""
    proto = onnx.load(path, load_external_data=False)
    (tensor,) = [t for t in proto.graph.initializer if t.name == "weight"]
    return {entry.key: entry.value for entry in tensor.external_data}


def test_a_written_graph_is_the_same_graph(tmp_path: Path) -> None:
    model, x = graph(WEIGHT), seeded(2, 48, seed=1).numpy()
    with WeightFile(tmp_path / "weights.bin") as weights:
        write(model, tmp_path / "a.onnx", weights)
    np.testing.assert_array_equal(run_file(tmp_path / "a.onnx", x), run(model, {"x": x})["c"])
    assert (tmp_path / "a.onnx").stat().st_size < 1000
    assert (tmp_path / "weights.bin").read_bytes() == WEIGHT.tobytes()
    onnx.checker.check_model(str(tmp_path / "a.onnx"), full_check=True)


def test_equal_weights_are_stored_once(tmp_path: Path) -> None:
    other = seeded(48, 64, seed=2).numpy()
    with WeightFile(tmp_path / "weights.bin") as weights:
        write(graph(WEIGHT), tmp_path / "a.onnx", weights)
        write(graph(other, rows=8), tmp_path / "b.onnx", weights)
        write(graph(WEIGHT.copy(), rows=8), tmp_path / "c.onnx", weights)
    assert place(tmp_path / "a.onnx") == place(tmp_path / "c.onnx")
    offset = int(place(tmp_path / "b.onnx")["offset"])
    assert offset % PAGE == 0
    data = (tmp_path / "weights.bin").read_bytes()
    assert len(data) == offset + other.nbytes
    assert data[: WEIGHT.nbytes] == WEIGHT.tobytes()
    assert data[offset:] == other.tobytes()


def test_a_table_is_shared_with_the_graphs(tmp_path: Path) -> None:
    x = seeded(2, 48, seed=1).numpy()
    with WeightFile(tmp_path / "weights.bin") as weights:
        weights.write_table(WEIGHT, tmp_path / "table.npy")
        write(graph(WEIGHT), tmp_path / "a.onnx", weights)
    assert place(tmp_path / "a.onnx") == {
        "location": "table.npy",
        "offset": "128",
        "length": str(WEIGHT.nbytes),
    }
    assert (tmp_path / "weights.bin").stat().st_size == 0
    np.testing.assert_array_equal(np.load(tmp_path / "table.npy"), WEIGHT)
    expected = run(graph(WEIGHT), {"x": x})["c"]
    np.testing.assert_array_equal(run_file(tmp_path / "a.onnx", x), expected)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with WeightFile(tmp_path / name / "weights.bin") as weights:
            write(graph(WEIGHT), tmp_path / name / "a.onnx", weights)
    for file in ("a.onnx", "weights.bin"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_model_stays_in_memory_as_it_was(tmp_path: Path) -> None:
    model = graph(WEIGHT)
    before = model.graph.initializers["weight"].const_value
    with WeightFile(tmp_path / "weights.bin") as weights:
        write(model, tmp_path / "a.onnx", weights)
    assert model.graph.initializers["weight"].const_value is before


@pytest.mark.parametrize(("number", "count"), [(np.nan, 1), (np.inf, 3)])
def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, number: float, count: int) -> None:
    broken = WEIGHT.copy()
    broken[:count, 5] = number
    with WeightFile(tmp_path / "weights.bin") as weights, pytest.raises(ExportError) as caught:
        write(graph(broken), tmp_path / "a.onnx", weights)
    assert str(caught.value) == (
        f"step_2: 'weight' holds {count} of 3072 numbers that are NaN or infinite\n"
        "  hint: check the checkpoint, and the passes that touched this tensor"
    )
    assert not (tmp_path / "a.onnx").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        WeightFile(tmp_path / "weights.bin")
    with WeightFile(tmp_path / "other.bin") as weights:
        (tmp_path / "a.onnx").write_bytes(b"mine")
        with pytest.raises(FileExistsError):
            write(graph(WEIGHT), tmp_path / "a.onnx", weights)
    assert (tmp_path / "weights.bin").read_bytes() == b"mine"
    assert (tmp_path / "a.onnx").read_bytes() == b"mine"
