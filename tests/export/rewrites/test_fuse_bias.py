"""The bias of a projection moves into the node that reads it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgevlm_export.rewrites.fuse_bias import FuseBias
from tests.export.running import nodes, parsed, run, seeded

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
NUMBERS = ", ".join(str(i / 16) for i in range(16))


def graph(body: str, outputs: str = "float[1,T,16] c") -> ir.Model:
    return parsed(f"""{HEADER}
        g (float[1,T,16] x, float[1,T,16] r) => ({outputs})
        <float[16] bias = {{{NUMBERS}}}, float[16] w = {{{NUMBERS}}}, float[16] v = {{{NUMBERS}}}>
        {{ {body} }}""")


FEEDS = {"x": seeded(1, 3, 16).numpy(), "r": seeded(1, 3, 16, seed=1).numpy()}
FUSED = {
    "Gelu": ("c = com.microsoft.Gelu(b)", "BiasGelu(a, bias)"),
    "FastGelu": ("c = com.microsoft.FastGelu(b)", "FastGelu(a, bias)"),
}


@pytest.mark.parametrize("op", FUSED)
def test_bias_goes_into_the_reader(op: str) -> None:
    line, fused = FUSED[op]
    model = graph(f"a = Neg(x) b = Add(a, bias) {line}")
    before = run(model, FEEDS)["c"]
    assert FuseBias()(model).modified
    assert nodes(model) == ["a: a = Neg(x)", f"c: c = {fused}"]
    # The tanh form and its fused kernel differ by a few units in the last place.
    np.testing.assert_allclose(run(model, FEEDS)["c"], before, atol=2e-6, rtol=0)
    assert model.metadata_props == {"edgevlm.tap.b": '{"parts": ["a"], "bias": "bias"}'}


def test_three_biases_of_one_projection_become_one() -> None:
    body = "".join(f"{part} = Neg({src}) " for part, src in (("q", "x"), ("k", "r"), ("v0", "x")))
    body += "sq = Add(q, bias) sk = Add(k, w) sv = Add(v0, v)"
    body += "c = com.microsoft.MultiHeadAttention <num_heads = 1> (sq, sk, sv)"
    model = graph(body)
    before = run(model, FEEDS)["c"]
    for name in ("sq", "sk", "sv"):
        next(n for n in model.graph if n.name == name).outputs[0].name = f"b/{name[1]}"
    assert FuseBias()(model).modified
    assert nodes(model)[-1] == "c: c = MultiHeadAttention(q, k, v0, b.bias)"
    joined = model.graph.initializers["b.bias"].const_value
    assert joined is not None
    np.testing.assert_array_equal(joined.numpy(), np.tile(np.arange(16) / 16, 3))
    # The same sums in another order.
    np.testing.assert_allclose(run(model, FEEDS)["c"], before, atol=2e-6, rtol=0)
    taps = {"edgevlm.tap.b": '{"parts": ["q", "k", "v0"], "bias": "b.bias"}'}
    assert model.metadata_props == taps


@pytest.mark.parametrize(
    "body",
    [
        "b = Add(x, r) c = com.microsoft.Gelu(b)",
        "b = Add(x, bias) c = com.microsoft.BiasGelu(b, w)",
        "b = Add(x, bias) c = com.microsoft.FastGelu(b, w)",
        "b = Add(x, bias) a = com.microsoft.Gelu(b) c = Add(a, b)",
        "a = Add(x, bias) b = Add(r, bias) c = com.microsoft.MultiHeadAttention <num_heads = 1> "
        "(a, b, x)",
    ],
    ids=["no constant", "fused already", "biased already", "two readers", "a third without"],
)
def test_other_patterns_stay(body: str) -> None:
    model = graph(body)
    before = nodes(model)
    assert not FuseBias()(model).modified
    assert nodes(model) == before


def test_a_graph_output_stays() -> None:
    model = graph("b = Add(x, bias) c = com.microsoft.Gelu(b)", "float[1,T,16] c, float[1,T,16] b")
    assert not FuseBias()(model).modified
