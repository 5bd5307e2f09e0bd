"""Shapes that inference knows become constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgevlm_export.rewrites.constant_shapes import ConstantShapes
from tests.export.running import nodes, parsed, run, seeded

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def graph(out: list[int | str], *, declared: str = "float[A,B,C] c") -> ir.Model:
    """x [N, 4, 6] reshaped by a computed shape to [N, 24]; `out` is what inference says."""
    model = parsed(f"""{HEADER}
        g (float[N,4,6] x) => ({declared}) <int64[1] rest = {{24}}>
        {{ n = Shape <start = 0, end = 1> (x) s = Concat <axis = 0> (n, rest)
           b = Reshape <allowzero = 1> (x, s) c = Neg(b) }}""")
    next(n for n in model.graph if n.name == "b").outputs[0].shape = ir.Shape(out)
    model.graph.inputs[0].shape = ir.Shape(["N", 4, 6])
    return model


def test_a_shape_known_up_to_one_dimension_is_constant() -> None:
    model = graph(["N", 24])
    feeds = {"x": seeded(3, 4, 6).numpy()}
    before = run(model, feeds)["c"]
    assert ConstantShapes()(model).modified
    assert nodes(model) == ["b: b = Reshape(x, plumbing/int64[2](-1,24))", "c: c = Neg(b)"]
    np.testing.assert_array_equal(run(model, feeds)["c"], before)


def test_a_reshape_to_the_same_shape_is_dropped() -> None:
    model = graph(["N", 4, 6])
    assert ConstantShapes()(model).modified
    assert nodes(model) == ["c: c = Neg(x)"]


def test_two_dynamic_dimensions_stay() -> None:
    model = graph(["N", "M"])
    before = nodes(model)
    assert not ConstantShapes()(model).modified
    assert nodes(model) == before


def test_an_unknown_shape_stays() -> None:
    model = graph(["N", 24])
    next(n for n in model.graph if n.name == "b").outputs[0].shape = None
    assert not ConstantShapes()(model).modified
