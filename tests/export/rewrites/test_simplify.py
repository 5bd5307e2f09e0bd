"""onnxsim simplifies, and every site survives."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgevlm_export.rewrites.simplify import Simplify
from tests.export.running import nodes, parsed, run, seeded

NUMBERS = ", ".join(str(i / 256) for i in range(512))


def graph(body: str) -> ir.Model:
    model = parsed(f"""<ir_version: 10, opset_import: ["" : 19]>
        g (float[2,16] x) => (float[2,32] c)
        <float[16,32] weight = {{{NUMBERS}}}, float one = {{1}}, float two = {{2}},
         int64[2] same = {{2, 16}}, int64[1] flat = {{32}}>
        {{ {body} }}""")
    model.metadata_props["edgevlm.tap.s"] = '{"parts": ["c"], "bias": null}'
    return model


FEEDS = {"x": seeded(2, 16).numpy()}


def test_constants_fold_and_nothing_else_changes() -> None:
    model = graph("k = Add(one, two) a = Reshape(x, same) b = Mul(a, k) c = MatMul(b, weight)")
    for node in list(model.graph)[:2]:
        node.name = node.outputs[0].name = f"b/{node.name}"
    before = run(model, FEEDS)["c"]
    result = Simplify()(model)
    assert result.modified
    assert [node.op_type for node in result.model.graph] == ["Mul", "MatMul"]
    assert [node.name for node in result.model.graph] == ["b", "c"]
    np.testing.assert_array_equal(run(result.model, FEEDS)["c"], before)


def test_weights_are_not_copied() -> None:
    model = graph("b = Relu(x) c = MatMul(b, weight)")
    weight = model.graph.initializers["weight"].const_value
    simplified = Simplify()(model).model
    assert simplified.graph.initializers["weight"].const_value is weight
    assert [value.name for value in simplified.graph.inputs] == ["x"]


def test_what_was_known_of_the_model_stays() -> None:
    model = graph("b = Relu(x) c = MatMul(b, weight)")
    simplified = Simplify()(model).model
    assert simplified.metadata_props == model.metadata_props
    assert dict(simplified.meta) == dict(model.meta)


def test_a_graph_that_would_lose_a_site_is_kept() -> None:
    # The value of site `a` does nothing, onnxsim drops it.
    model = graph("a = Reshape(x, same) b = Relu(a) c = MatMul(b, weight)")
    before = nodes(model)
    result = Simplify()(model)
    assert not result.modified
    assert nodes(result.model) == before


def test_a_site_between_two_reshapes_stays() -> None:
    """As norms of heads have it: flat rows leave a site, and become heads again."""
    model = graph("a = Reshape(x, flat) b = Reshape(a, same) c = MatMul(b, weight)")
    result = Simplify()(model)
    assert result.modified
    assert nodes(result.model) == nodes(model)


def test_a_sum_of_one_number_keeps_its_name() -> None:
    """As a Squeeze it would have none, and the whole graph would be kept as it is."""
    model = parsed("""<ir_version: 10, opset_import: ["" : 19]>
        g (float[2,1,16] x) => (float[2,16] b)
        <float one = {1}, float two = {2}, int64[1] axis = {1}>
        { k = Add(one, two) a = Mul(x, k) b = ReduceSum<keepdims = 0>(a, axis) }""")
    model.graph[0].name = model.graph[0].outputs[0].name = "a/k"
    result = Simplify()(model)
    assert result.modified
    assert [node.op_type for node in result.model.graph] == ["Mul", "ReduceSum"]
