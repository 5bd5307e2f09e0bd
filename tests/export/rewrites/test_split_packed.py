"""A packed projection becomes three where attention reads three."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgevlm_export.lower import lower
from edgevlm_export.ops.op import DOMAIN
from edgevlm_export.rewrites.split_packed import SplitPacked
from edgevlm_export.targets import TARGETS
from tests.export.running import model_of, nodes, run, seeded

HEADS, SIZE, ROWS = 2, 8, 5
WIDTH = HEADS * SIZE


def graph(*, also_read: bool = False, kv_heads: int = HEADS) -> ir.Model:
    packed_width = (HEADS + 2 * kv_heads) * SIZE
    x, weight, bias = seeded(1, ROWS, 12), seeded(packed_width, 12, seed=1), seeded(packed_width)
    kind = ir.TensorType(ir.DataType.FLOAT)
    inputs = [ir.Value(name="x", shape=ir.Shape(x.shape), type=kind)]
    constants = [
        ir.Value(name=name, shape=ir.Shape(t.shape), type=kind, const_value=ir.tensor(t.numpy()))
        for name, t in (("weight", weight), ("bias", bias))
    ]
    linear = ir.node("linear", [*inputs, *constants], domain=DOMAIN, name="a")
    packed = linear.outputs[0]
    packed.name, packed.shape, packed.type = "a", ir.Shape([1, ROWS, packed_width]), kind
    options = {"num_heads": HEADS, "num_kv_heads": kv_heads, "scale": 0.3, "causal": 0}
    attention = ir.node("attention", [packed], options, domain=DOMAIN, name="b")
    out = attention.outputs[0]
    out.name, out.shape, out.type = "b", ir.Shape([1, ROWS, WIDTH]), kind
    return model_of(
        ir.Graph(
            inputs,
            [out, packed] if also_read else [out],
            nodes=[linear, attention],
            initializers=constants,
            opset_imports={"": 18, DOMAIN: 1},
            name="graph",
        ),
        sites=("a", "b"),
    )


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("target", ["ort", "static"])
def test_one_projection_becomes_three(target: str, kv_heads: int) -> None:
    feeds = {"x": seeded(1, ROWS, 12).numpy()}
    whole = lower(graph(also_read=True, kv_heads=kv_heads), TARGETS[target])
    split = lower(graph(kv_heads=kv_heads), TARGETS[target])
    # The same products, summed alike but for the blocking of the matrix product.
    np.testing.assert_allclose(run(split, feeds)["b"], run(whole, feeds)["b"], atol=2e-6, rtol=0)
    products = [line for line in nodes(split) if "weight" in line]
    assert products == [
        f"a/{part}/matmul: a/{part}/matmul = MatMul(x, weight/{part}.T)" for part in "qkv"
    ]
    tap = '{"parts": ["a/q", "a/k", "a/v"], "bias": null}'
    fused = '{"parts": ["a/q/matmul", "a/k/matmul", "a/v/matmul"], "bias": "a.bias"}'
    is_fused = target == "ort" and kv_heads == HEADS
    assert split.metadata_props == {"edgevlm.tap.a": fused if is_fused else tap}


def test_slices_are_rows_of_the_weight() -> None:
    model = graph(kv_heads=1)
    constants = {name: v.const_value for name, v in model.graph.initializers.items()}
    assert SplitPacked()(model).modified
    for part, rows in (("q", slice(0, 16)), ("k", slice(16, 24)), ("v", slice(24, 32))):
        for name in ("weight", "bias"):
            tensor, source = model.graph.initializers[f"{name}/{part}"].const_value, constants[name]
            assert tensor is not None
            assert source is not None
            np.testing.assert_array_equal(tensor.numpy(), source.numpy()[rows])


def test_a_projection_that_something_else_reads_stays() -> None:
    model = graph(also_read=True)
    before = nodes(model)
    assert not SplitPacked()(model).modified
    assert nodes(model) == before
