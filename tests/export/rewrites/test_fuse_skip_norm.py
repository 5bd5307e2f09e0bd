"""A residual add and the norm of its sum become one node."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgevlm_export.rewrites.fuse_skip_norm import FuseSkipNorm
from tests.export.running import nodes, parsed, run, seeded

RMS = "SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (a, w)"
MEAN = "LayerNormalization <axis = -1, epsilon = 0.00001> (a, w, v)"


def graph(norm: str = RMS, add: str = "Add(x, y)", *, keep: bool = True) -> ir.Model:
    last = "c = Neg(b) a2 = Neg(a)" if keep else "c = Neg(b) a2 = Neg(x)"
    return parsed(f"""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[1,T,16] x, float[1,T,16] y) => (float[1,T,16] c, float[1,T,16] a2)
        <float[16] w = {{{", ".join(["1.5"] * 16)}}}, float[16] v = {{{", ".join(["0.5"] * 16)}}}>
        {{ a = {add} b = {norm} {last} }}
    """)


def typed(model: ir.Model) -> ir.Model:
    """Capture knows the shapes of values; the text of a test names only inputs and outputs."""
    shape = ir.Shape([1, "T", 16])
    for node in model.graph:
        for output in node.outputs:
            output.shape, output.type = shape, ir.TensorType(ir.DataType.FLOAT)
    return model


@pytest.mark.parametrize(
    ("read", "total", "kept"),
    [(True, "layer/add", True), (False, "layer/add", False), (False, "layer", True)],
    ids=["sum is read", "sum is not read", "sum is a site that nothing reads"],
)
def test_add_goes_into_the_norm(read: bool, total: str, kept: bool) -> None:
    """The last layer of a SigLIP encoder is read by its norm alone, and is a site all the same."""
    model = typed(graph(keep=read))
    next(iter(model.graph)).outputs[0].name = total
    feeds = {"x": seeded(1, 3, 16).numpy(), "y": seeded(1, 3, 16, seed=1).numpy()}
    before = run(model, feeds)
    assert FuseSkipNorm()(model).modified
    outputs = f"b, _, _, {total}" if kept else "b"
    assert nodes(model)[0] == f"b: {outputs} = SkipSimplifiedLayerNormalization(x, y, w)"
    after = run(model, feeds)
    for name in before:
        # The same sums in another order.
        np.testing.assert_allclose(after[name], before[name], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("norm", "add"),
    [
        (RMS, "Add(x, w)"),
        (RMS, "Sub(x, y)"),
        (RMS.replace("-1", "1"), "Add(x, y)"),
        (MEAN, "Add(x, y)"),
    ],
    ids=["a constant", "a difference", "another axis", "a norm whose fused kernel is slower"],
)
def test_other_patterns_stay(norm: str, add: str) -> None:
    model = typed(graph(norm, add))
    before = nodes(model)
    assert not FuseSkipNorm()(model).modified
    assert nodes(model) == before


def test_shapes_that_differ_stay() -> None:
    model = typed(graph())
    model.graph.inputs[1].shape = ir.Shape([1, 1, 16])
    assert not FuseSkipNorm()(model).modified


def test_the_sum_is_made_before_its_first_reader() -> None:
    """The norm comes late, and something earlier reads the sum."""
    model = typed(
        parsed("""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[1,T,16] x, float[1,T,16] y) => (float[1,T,16] c, float[1,T,16] b)
        <float[16] w = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}>
        { a = Add(x, y) c = Neg(a)
          b = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (a, w) }
    """)
    )
    FuseSkipNorm()(model)
    assert nodes(model) == [
        "b: b, _, _, a = SkipSimplifiedLayerNormalization(x, y, w)",
        "c: c = Neg(a)",
    ]


def test_one_of_two_norms_takes_the_add() -> None:
    """As parallel attention and MLP have it: both norms read one sum."""
    model = typed(
        parsed("""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[1,T,16] x, float[1,T,16] y) => (float[1,T,16] c, float[1,T,16] b)
        <float[16] w = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}>
        { a = Add(x, y)
          b = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (a, w)
          c = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (a, w) }
    """)
    )
    assert FuseSkipNorm()(model).modified
    assert nodes(model) == [
        "b: b, _, _, a = SkipSimplifiedLayerNormalization(x, y, w)",
        "c: c = SimplifiedLayerNormalization(a, w)",
    ]
