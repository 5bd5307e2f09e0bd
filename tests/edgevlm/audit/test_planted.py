"""Lies planted in files after they were written: each is named, with its site and its cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from edgevlm.audit.precision import Precision
from edgevlm.audit.report import COARSER, FINER, NOT_REALISED
from tests.edgevlm.audit.sites import (
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
    nbits_weights,
    replace_constants,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The honest file."""
    return honest_file(tmp_path)


def plant_float_product(path: Path) -> None:
    with edited(path) as graph:
        node = find(graph, "a")
        node.op_type, node.domain = "MatMul", ""
        del node.input[2:], node.attribute[:]
        replace_constants(graph, {"a.weight": np.ones((WIDTH, WIDTH), np.float32)})


def plant_level(path: Path, site: str, level: int) -> None:
    with edited(path) as graph:
        for given in find(graph, site).attribute:
            if given.name == "accuracy_level":
                given.i = level


def plant_blocks(path: Path, bits: int, block: int) -> None:
    packed, scales = nbits_weights(Written().weights(), bits, block)
    with edited(path) as graph:
        for given in find(graph, "a").attribute:
            given.i = {"bits": bits, "block_size": block}.get(given.name, given.i)
        replace_constants(graph, {"a.weight": packed, "a.scale": scales})


def plant_equal_scales(path: Path) -> None:
    _, scales = nbits_weights(Written().weights(), 4, 32)
    with edited(path) as graph:
        replace_constants(graph, {"a.scale": np.repeat(scales[:, :1], 2, axis=1)})


def plant_no_pair(path: Path) -> None:
    with edited(path) as graph:
        pair = [find(graph, "c/quantize"), find(graph, "c/dequantize")]
        find(graph, "c").input[0] = pair[0].input[0]
        for node in pair:
            graph.node.remove(node)


def plant_no_site(path: Path) -> None:
    with edited(path) as graph:
        find(graph, "e").input[0] = "c"
        for node in [node for node in graph.node if node.name.partition("/")[0] == "d"]:
            graph.node.remove(node)


def plant_other_op(path: Path) -> None:
    with edited(path) as graph:
        node = find(graph, "e")
        node.op_type, node.domain = "Identity", ""
        del node.input[1:]


def plant_whole_reduction(path: Path) -> None:
    with edited(path) as graph:
        replace_constants(graph, {"last": np.array([0, 1])})


def plant_constant_scale(path: Path) -> None:
    with edited(path) as graph:
        find(graph, "d/rounded").input[0] = "c"


def plant_wide_weights(path: Path) -> None:
    with edited(path) as graph:
        for name in ("c.weight", "c.zero"):
            (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
            wide = numpy_helper.to_array(tensor).astype(np.int16)
            tensor.CopyFrom(numpy_helper.from_array(wide, name))


def plant_float_bias(path: Path) -> None:
    """ONNX Runtime fuses a Gemm only with a bias of int32."""
    with edited(path) as graph:
        node = find(graph, "c")
        node.op_type = "Gemm"
        node.input.append("bias")
        graph.initializer.append(numpy_helper.from_array(np.ones(WIDTH, np.float32), "bias"))


def plant_one_scale(path: Path) -> None:
    with edited(path) as graph:
        replace_constants(
            graph,
            {
                "c.scale": np.array([0.01], np.float32),
                "c.zero": np.array([0], np.int8),
            },
        )


def plant_scales_of_inputs(path: Path) -> None:
    with edited(path) as graph:
        find(graph, "c/weights").attribute[0].i = 0


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (
            plant_float_product,
            ("a", NOT_REALISED, "weights are float32, asked int4: so the file has them"),
        ),
        (
            lambda path: plant_level(path, "a", 4),
            ("a", COARSER, "MatMulNBits 4-bit block 32 level 4 multiplies int8, asked float32"),
        ),
        (
            lambda path: plant_level(path, "b", 0),
            (
                "b",
                NOT_REALISED,
                "MatMulNBits 4-bit block 32 level 0 multiplies float32, asked int8",
            ),
        ),
        (
            lambda path: plant_blocks(path, 8, 32),
            ("a", NOT_REALISED, "weights are int8, asked int4: so the file has them"),
        ),
        (
            lambda path: plant_blocks(path, 4, 16),
            ("a", FINER, "scales of weights are per group of 16, asked per group of 32"),
        ),
        (
            lambda path: plant_blocks(path, 4, 64),
            ("a", COARSER, "scales of weights are per channel, asked per group of 32"),
        ),
        (
            plant_equal_scales,
            ("a", COARSER, "scales of weights are per channel, asked per group of 32"),
        ),
        (
            plant_no_pair,
            (
                "c",
                FINER,
                "scales of activations are per group of 32, asked per tensor; scales of "
                "activations are found in every call, asked constant; onnxruntime made it of "
                "MatMul",
            ),
        ),
        (plant_no_site, ("d", NOT_REALISED, "no op of this site is in the file")),
        (plant_other_op, ("e", NOT_REALISED, "Identity 'e' was fused into MatMul 'f'")),
        (
            plant_whole_reduction,
            ("d/product", COARSER, "scales of activations are per tensor, asked per token"),
        ),
        (
            plant_wide_weights,
            (
                "c",
                NOT_REALISED,
                "weights are int16, asked int8: so the file has them; "
                "MatMul multiplies float32, of activations rounded to int8",
            ),
        ),
        (
            plant_float_bias,
            (
                "c",
                NOT_REALISED,
                "'c/weights' expands the int8 weights to floats in every call; "
                "Gemm multiplies float32, of activations rounded to int8",
            ),
        ),
        (
            plant_one_scale,
            (
                "c",
                COARSER,
                "scales of weights are per tensor, asked per channel; "
                "onnxruntime made it of MatMul",
            ),
        ),
        (
            plant_scales_of_inputs,
            (
                "c",
                NOT_REALISED,
                "the file has a scale for each input of the weights, and onnxruntime multiplies "
                "outputs by them: a wrong product; onnxruntime made it of MatMul",
            ),
        ),
    ],
)
def test_a_planted_lie_is_named(
    path: Path, plant: Callable[[Path], None], expected: Difference
) -> None:
    plant(path)
    assert differences(audited(path)) == [expected]


def test_a_constant_in_place_of_the_scale_of_a_row(path: Path) -> None:
    """The pair of `c` has two readers then, and the second wants floats."""
    plant_constant_scale(path)
    assert differences(audited(path))[-1] == (
        "d/product",
        COARSER,
        "scales of activations are per tensor, asked per token; "
        "scales of activations are constant, asked found in every call",
    )


def test_weights_in_floats_of_two_readers(tmp_path: Path) -> None:
    """Weights that two products share are fused into neither: each expands them in every call."""
    written = Written()
    held = written.channels("a")
    written.node("DequantizeLinear", list(held), "a/weights", axis=1)
    written.node("MatMul", ["x", "a/weights"], "a")
    written.node("MatMul", ["a", "a/weights"], "b")
    asked = {
        site: Precision(weights="int8", weight_granularity="channel", activations="float32")
        for site in ("a", "b")
    }
    audit = audited(written.write(tmp_path), asked=asked)
    assert sorted(differences(audit)) == [
        ("a", NOT_REALISED, "'a/weights' expands the int8 weights to floats in every call"),
        (
            "b",
            NOT_REALISED,
            "'a/weights/duplicated' expands the int8 weights to floats in every call",
        ),
    ]
    assert [row.name for row in audit.inserted] == ["a/weights/duplicated"]
