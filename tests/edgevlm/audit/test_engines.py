"""What an engine makes of an honest file: by its options, its kernels and its processor."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgevlm.audit.precision import Precision
from edgevlm.audit.report import NOT_REALISED
from tests.edgevlm.audit.sites import (
    FLOAT8,
    STATIC,
    TOKEN,
    Difference,
    audited,
    differences,
    honest_file,
)
from tests.edgevlm.audit.written import (
    WIDTH,
    Written,
    edited,
    find,
    graph_spec,
    replace_constants,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The honest file."""
    return honest_file(tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"session__disable_prepacking": "1"},
            [
                (
                    "b",
                    NOT_REALISED,
                    "MatMulNBits 4-bit block 32 level 4 (no kernel here, level 0 ran) multiplies "
                    "float32, asked int8",
                )
            ],
        ),
        (
            {"session__disable_quant_qdq": "1"},
            [
                (
                    "c",
                    NOT_REALISED,
                    "weights are float32, asked int8: onnxruntime made them of the int8 in the "
                    "file; MatMul multiplies float32, of activations rounded to int8",
                )
            ],
        ),
        (
            {"graph_optimization_level": "basic"},
            [
                (
                    "c",
                    NOT_REALISED,
                    "'c/weights' expands the int8 weights to floats in every call; "
                    "MatMul multiplies float32, of activations rounded to int8",
                )
            ],
        ),
        ({"session__x64quantprecision": "1"}, []),
    ],
)
def test_options_of_the_engine_are_those_that_count(
    path: Path, options: dict[str, str], expected: list[Difference]
) -> None:
    assert differences(audited(path, graph_spec(**options))) == expected


def float8_file(folder: Path) -> Path:
    """Products in float8, as QuantizeLinear and DequantizeLinear say them."""
    written = Written()
    kind = ml_dtypes.float8_e4m3fn
    weights = written.weights()
    scale = (np.abs(weights).max(axis=0) / 448).astype(np.float32)
    small = (weights / scale).astype(kind)

    def tensor(values: np.ndarray) -> onnx.TensorProto:
        raw = values.tobytes()
        return helper.make_tensor("", TensorProto.FLOAT8E4M3FN, values.shape, raw, raw=True)

    pair = [
        written.constant("x_scale", np.float32(0.01)),
        written.constant("zero", tensor(np.zeros((), kind))),
    ]
    rounded = written.node("QuantizeLinear", ["x", *pair], "a/quantize")
    rounded = written.node("DequantizeLinear", [rounded, *pair], "a/dequantize")
    held = [written.constant("w", tensor(small)), written.constant("s", scale)]
    real = written.node("DequantizeLinear", held, "a/weights", axis=1)
    written.node("MatMul", [rounded, real], "a")
    return written.write(folder)


def test_a_scheme_that_the_engine_refuses(tmp_path: Path) -> None:
    audit = audited(float8_file(tmp_path), asked={"a": FLOAT8})
    refused = (
        f"onnxruntime {ort.__version__} refuses the graph: This is an invalid "
        "model. Type Error: Type 'tensor(float8e4m3fn)' of input parameter (a/quantize) of "
        "operator (MatMulIntegerToFloat) in node (a) is invalid"
    )
    assert audit.refused == refused
    assert differences(audit) == [("a", NOT_REALISED, refused)]


def test_a_product_that_the_engine_refuses_as_it_runs(tmp_path: Path) -> None:
    """Block scales before products of integers are fused at load, and refused in a run."""
    path = Written().qdq("a").write(tmp_path)
    with edited(path) as graph:
        node = find(graph, "a/weights")
        node.attribute[0].i = 0
        node.attribute.append(helper.make_attribute("block_size", 32))
        blocks = {"a.scale": np.full((2, WIDTH), 0.01, np.float32)}
        replace_constants(graph, {**blocks, "a.zero": np.zeros((2, WIDTH), np.int8)})
    audit = audited(path, asked={"a": STATIC})
    (found,) = differences(audit)
    assert found[:2] == ("a", NOT_REALISED)
    assert "refuses the graph: Non-zero status code" in found[2]
    assert "while running MatMulIntegerToFloat node. Name:'a'" in found[2]


@pytest.mark.parametrize("emulated", [True, False])
def test_float8_that_is_folded_to_floats(tmp_path: Path, emulated: bool) -> None:
    asked = Precision(**{**fields(FLOAT8), "emulated": emulated})
    audit = audited(float8_file(tmp_path), graph_spec(emulates=True), {"a": asked})
    expected = (
        "weights are float32, asked float8_e4m3fn: onnxruntime made them of the float8_e4m3fn in "
        "the file; MatMul multiplies float32, of activations rounded to float8_e4m3fn"
    )
    assert differences(audit) == ([] if emulated else [("a", NOT_REALISED, expected)])
    assert ("a/weights", "DequantizeLinear", "folded") in [
        (gone.name, gone.op, gone.fate) for gone in audit.gone
    ]


def fields(precision: Precision) -> dict[str, object]:
    return {name: getattr(precision, name) for name in Precision.__dataclass_fields__}


def test_an_emulated_pair_that_was_dropped(tmp_path: Path) -> None:
    path = Written().qdq("a", activations="int16").write(tmp_path)
    asked = {"a": Precision(**{**fields(STATIC), "activations": "int16", "emulated": True})}
    spec = graph_spec(emulates=True)
    audit = audited(path, spec, asked)
    assert differences(audit) == []
    assert [str(row.realised) for row in audit.rows if row.asked] == [
        "int8 channel x int16 tensor static, emulated"
    ]
    with edited(path) as graph:
        pair = [find(graph, "a/quantize"), find(graph, "a/dequantize")]
        find(graph, "a").input[0] = "x"
        for node in pair:
            graph.node.remove(node)
    assert differences(audited(path, spec, asked)) == [
        ("a", NOT_REALISED, "activations are float32, asked int16")
    ]


def test_pairs_of_weights_that_saturate(tmp_path: Path) -> None:
    """Named where neighbours pass 16 bits together, on a processor that adds them so."""
    path = Written().token("a", most=127).write(tmp_path)
    audit = audited(path, asked={"a": TOKEN})
    weights = next(
        numpy_helper.to_array(tensor).astype(np.int64)
        for tensor in onnx.load(path).graph.initializer
        if tensor.name == "a.weight"
    )
    count = 0
    for first, second in zip(weights[0::2].ravel(), weights[1::2].ravel(), strict=True):
        products = [255 * max(first, 0) + 255 * max(second, 0)]
        products.append(255 * min(first, 0) + 255 * min(second, 0))
        count += products[0] > 32767 or products[1] < -32768
    assert count > 0
    (row,) = audit.hazards or (None,)
    if row is None:
        flags = Path("/proc/cpuinfo").read_text().split()
        assert "avx512_vnni" in flags or "avx_vnni" in flags or "asimd" in flags
        return
    assert row.name == "a/product"
    assert row.hazard == (
        f"u8 x s8 saturates on this processor: {count:,} of 2,048 pairs of weights can pass 16 bits"
    )
    wide = audited(path, graph_spec(session__x64quantprecision="1"), {"a": TOKEN})
    assert wide.hazards == ()
    assert differences(wide) == []
