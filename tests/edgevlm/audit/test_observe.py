"""How graphs are loaded to be looked at: which files are made, which arrays are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgevlm.audit.observe import RefusalError, observe
from edgevlm_runtime.manifest import GraphSpec, TensorSpec
from tests.edgevlm.audit.written import Written, edited, feeds, find, graph_spec


@pytest.mark.parametrize("embedded_bytes", [0, 1 << 30])
def test_constants_are_those_of_the_session_wherever_they_lie(
    tmp_path: Path, embedded_bytes: int
) -> None:
    """Folded weights lie in the optimized graph, or with all others in a file of their own."""
    path = Written().nbits("a").qdq("b").write(tmp_path)
    written = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
    }
    folded = written["b.weight"].astype(np.float32) * written["b.scale"]
    spec = graph_spec(emulates=True)
    with observe(path, spec, feeds(), in_place={}, runs=1, embedded_bytes=embedded_bytes) as seen:
        held = {
            name: value.const_value.numpy()
            for name, value in seen.model.graph.initializers.items()
            if value.const_value is not None
        }
        (folder,) = (file for file in tmp_path.iterdir() if file.is_dir())
        assert (folder / "g.onnx.weights").exists() == (embedded_bytes == 0)
    assert np.array_equal(held["b/weights"], folded)
    assert np.array_equal(held["a.weight"], written["a.weight"])
    assert {file.name for file in tmp_path.iterdir()} == {"g.onnx", "g.weights"}


def growing(folder: Path) -> tuple[Path, GraphSpec]:
    """A graph that adds 1 to a state."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["past", "one"], ["present"], name="grow")],
        "step",
        [helper.make_tensor_value_info("past", TensorProto.FLOAT, [1, 2, 4, 8])],
        [helper.make_tensor_value_info("present", TensorProto.FLOAT, [1, 2, 4, 8])],
        [onnx.numpy_helper.from_array(np.ones((), np.float32), "one")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = folder / "g.onnx"
    onnx.save(model, path)
    past, present = (
        TensorSpec(name=name, dtype="float32", shape=(1, 2, 4, 8)) for name in ("past", "present")
    )
    engine = graph_spec().engine
    return path, GraphSpec(
        name="step", role="step", file="g.onnx", engine=engine, inputs=(past,), outputs=(present,)
    )


def test_arrays_that_are_written_in_place_are_copies(tmp_path: Path) -> None:
    path, spec = growing(tmp_path)
    past = np.zeros((1, 2, 4, 8), np.float32)
    with observe(path, spec, {"past": past}, in_place={"present": "past"}, runs=2) as seen:
        assert seen.kernels["grow"].op_type == "Add"
        # 64 numbers are read and 64 are written; the constant is no activation.
        assert seen.kernels["grow"].activation_bytes == 2 * 64 * 4
        assert seen.microseconds >= seen.kernels["grow"].microseconds
    assert not past.any()


def test_a_refusal_leaves_nothing_behind(tmp_path: Path) -> None:
    path = Written().nbits("a").write(tmp_path)
    with edited(path) as graph:
        find(graph, "a").op_type = "MatMulNoBits"
    with (
        pytest.raises(RefusalError) as refused,
        observe(path, graph_spec(), feeds(), in_place={}, runs=1),
    ):
        pass
    assert refused.value.message == (
        "Fatal error: com.microsoft:MatMulNoBits(-1) is not a registered function/op"
    )
    assert {file.name for file in tmp_path.iterdir()} == {"g.onnx", "g.weights"}
