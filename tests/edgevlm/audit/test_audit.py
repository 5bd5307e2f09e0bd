"""The audit of honest files: what ran, what it cost, and which op of the file it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from edgevlm.audit.precision import Precision
from edgevlm.audit.report import AS_ASKED, COARSER, NOT_ASKED, NOT_REALISED
from tests.edgevlm.audit.sites import (
    ASKED,
    W4A16,
    audited,
    differences,
    honest_file,
)
from tests.edgevlm.audit.written import (
    WIDTH,
    Written,
    graph_spec,
    save,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The honest file."""
    return honest_file(tmp_path)


def test_an_honest_file_is_as_asked(path: Path) -> None:
    audit = audited(path)
    assert differences(audit) == []
    assert audit.hazards == ()
    rows = {row.name: row for row in audit.rows}
    assert {name for name, row in rows.items() if row.outcome == AS_ASKED} == {
        *("a", "b", "c", "d/product", "e")
    }
    assert {row.outcome for row in audit.rows} == {AS_ASKED, NOT_ASKED}
    assert [rows[name].kernel for name in ("a", "b", "c", "d/product", "e", "f")] == [
        "MatMulNBits 4-bit block 32 level 0",
        "MatMulNBits 4-bit block 32 level 4",
        "MatMulIntegerToFloat u8 x s8",
        "MatMulIntegerToFloat u8 x s8",
        "DynamicQuantizeMatMul u8 x s8",
        "MatMul",
    ]
    for site, precision in ASKED.items():
        (row,) = (row for row in audit.rows if row.asked and row.site == site)
        assert row.realised == precision
    assert audit.engine == f"onnxruntime {ort.__version__}"


def test_ops_are_followed_through_the_load(path: Path) -> None:
    audit = audited(path)
    rows = {row.name: row for row in audit.rows}
    assert (rows["c"].written, rows["c"].op) == ("MatMul", "MatMulIntegerToFloat")
    assert {(gone.name, gone.op, gone.fate) for gone in audit.gone} == {
        ("c/dequantize", "DequantizeLinear", "fused into MatMulIntegerToFloat 'c'"),
        ("c/weights", "DequantizeLinear", "fused into MatMulIntegerToFloat 'c'"),
    }
    assert audit.inserted == ()


def test_times_and_bytes(path: Path) -> None:
    audit = audited(path)
    rows = {row.name: row for row in audit.rows}
    # 4 bits for each of 64 x 64 weights, and a float32 for each block of 32.
    assert rows["a"].weight_bytes == WIDTH * WIDTH // 2 + 4 * WIDTH * WIDTH // 32
    assert rows["f"].weight_bytes == 4 * WIDTH * WIDTH
    # Five rows of 64 floats are read, and five written.
    assert rows["a"].activation_bytes == rows["f"].activation_bytes == 2 * 5 * WIDTH * 4
    assert rows["c/quantize"].activation_bytes == 5 * WIDTH * (4 + 1)
    assert all(row.microseconds is not None and row.microseconds >= 0 for row in audit.rows)
    assert sum(row.share for row in audit.rows) == pytest.approx(1.0)
    assert audit.microseconds >= sum(row.microseconds or 0 for row in audit.rows)
    held = [numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(path).graph.initializer]
    assert audit.weight_bytes == sum(held)


def test_nothing_is_left_beside_the_graph(path: Path) -> None:
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    audited(path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_what_nobody_asked_for(path: Path) -> None:
    asked = {site: precision for site, precision in ASKED.items() if site != "d"}
    assert differences(audited(path, asked=asked)) == [
        (
            "d/product",
            COARSER,
            "MatMulIntegerToFloat u8 x s8 is int8 channel x int8 token, and nobody asked for it",
        )
    ]


def test_integers_in_the_place_of_other_ops(tmp_path: Path) -> None:
    """A pair before and behind a sum makes onnxruntime add integers."""
    written = Written().floats("a")
    written.pair("in", "uint8")
    written.node("Sigmoid", [written.value], "gate")
    written.pair("out", "uint8")
    audit = audited(written.floats("b").write(tmp_path), asked={})
    assert differences(audit) == [
        (
            "gate",
            COARSER,
            "QLinearSigmoid is int8 tensor static, and nobody asked for it; "
            "onnxruntime made it of Sigmoid",
        )
    ]


def test_fused_ops_are_those_that_they_are_named_after(tmp_path: Path) -> None:
    """With the optimizers that the targets leave out, a product and its bias become a Gemm."""
    written = Written().floats("a")
    bias = written.constant("a.bias", np.ones(WIDTH, np.float32))
    written.node("Add", [written.value, bias], "a/bias")
    path = written.write(tmp_path)
    asked = {"a": Precision(weights="float32", activations="float32")}
    spec = graph_spec(optimization__disable_specified_optimizers="")
    (row,) = (row for row in audited(path, spec, asked).rows if row.asked)
    assert (row.written, row.op, row.site, row.outcome) == ("MatMul", "Gemm", "a", AS_ASKED)
    (gone,) = audited(path, spec, asked).gone
    assert (gone.name, gone.fate) == ("a/bias", f"fused into Gemm {row.name!r}")
    assert differences(audited(path, spec, {"a": W4A16})) == [
        (
            row.name,
            NOT_REALISED,
            "weights are float32, asked int4: so the file has them; onnxruntime made it of MatMul",
        )
    ]


def test_an_op_that_lost_its_name_has_no_time(tmp_path: Path) -> None:
    written = Written().floats("a")
    written.node("Relu", [written.value], "act")
    path = written.floats("b").write(tmp_path)
    model = onnx.load(path)
    model.graph.node[1].name = ""
    save(model, path)
    audit = audited(path, asked={})
    rows = {row.name: row for row in audit.rows}
    assert (rows["act"].op, rows["act"].microseconds) == ("Relu", None)
    assert rows["Relu_1"].cause == "only in the profile: its op lost its name at load"
    assert rows["Relu_1"].microseconds is not None
