"""What traces find, in graphs given as text."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgevlm.audit.trace import Rounding, rounding, scales_of_blocks, stored

HEAD = """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
g (float[M, 64] x) => (float[M, 64] y)
<float one = {1.0}, float step = {0.1}, float inverse = {0.00787}, uint8 mid = {128},
 int16 zero = {0}, int64[1] last = {-1}, int64[1] second = {1}, int64[2] all = {0, 1},
 float[64] gain = {GAIN}>
{
"""
GAIN = ", ".join(["1.5"] * 64)


def value(body: str) -> ir.Value:
    """What the first output of the graph is computed from."""
    text = HEAD.replace("GAIN", GAIN) + body + "\ny = Identity(found)\n}"
    graph = ir.from_proto(onnx.parser.parse_model(text)).graph
    found = graph.outputs[0].producer()
    assert found is not None
    assert found.inputs[0] is not None
    return found.inputs[0]


ROWS = """
a = Abs(x)
m = ReduceMax<keepdims = 1>(a, AXES)
s = Mul(m, inverse)
t = Max(s, step)
w = Div(x, t)
q = QuantizeLinear(w, one, mid)
d = DequantizeLinear(q, one, mid)
found = Mul(d, t)
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            "q = QuantizeLinear(x, step, mid)\nfound = DequantizeLinear(q, step, mid)",
            Rounding(dtype="int8", granularity="tensor", dynamic=False, unsigned=True),
        ),
        (
            "q = QuantizeLinear(x, step, zero)\nd = DequantizeLinear(q, step, zero)\n"
            "found = Transpose(d)",
            Rounding(dtype="int16", granularity="tensor", dynamic=False, unsigned=False),
        ),
        (
            "q, s, z = DynamicQuantizeLinear(x)\nfound = DequantizeLinear(q, s, z)",
            Rounding(dtype="int8", granularity="tensor", dynamic=True, unsigned=True),
        ),
        (
            ROWS.replace("AXES", "last"),
            Rounding(dtype="int8", granularity="token", dynamic=True, unsigned=True),
        ),
        (
            ROWS.replace("AXES", "second"),
            Rounding(dtype="int8", granularity="token", dynamic=True, unsigned=True),
        ),
        (
            ROWS.replace("AXES", "all"),
            Rounding(dtype="int8", granularity="tensor", dynamic=True, unsigned=True),
        ),
        (
            "a = Abs(x)\nm = ReduceMax<keepdims = 1>(a, last)\ns = Mul(m, inverse)\n"
            "q = QuantizeLinear<output_dtype = 3>(x, s)\nfound = DequantizeLinear(q, s)",
            Rounding(dtype="int8", granularity="token", dynamic=True, unsigned=False),
        ),
        ("found = Relu(x)", None),
        ("found = Mul(x, step)", None),
    ],
    ids=["static", "int16", "dynamic", "token", "axis", "whole", "scale", "float", "product"],
)
def test_what_rounds_activations(body: str, expected: Rounding | None) -> None:
    assert rounding(value(body)) == expected


def test_a_norm_before_a_constant_scale_finds_none_of_it() -> None:
    """A norm divides a row by what it finds in the row, too, but rounds with a constant."""
    body = """
    a = Abs(x)
    m = ReduceMax<keepdims = 1>(a, last)
    n = Div(x, m)
    h = Mul(n, gain)
    w = Div(h, gain)
    q = QuantizeLinear(w, step, mid)
    found = DequantizeLinear(q, step, mid)
    """
    found = rounding(value(body))
    assert found is not None
    assert (found.granularity, found.dynamic) == ("tensor", False)


def weights(scale: np.ndarray, *, axis: int, block: int = 0, transposed: bool = False) -> ir.Value:
    """Int8 weights [K, N] = [64, 32] behind a DequantizeLinear."""
    shape = (32, 64) if transposed else (64, 32)
    q = ir.tensor(np.ones(shape, np.int8), name="q")
    inputs = [
        ir.Value(name="q", const_value=q, type=ir.TensorType(q.dtype), shape=ir.Shape(shape)),
        ir.Value(name="s", const_value=ir.tensor(scale, name="s")),
    ]
    node = ir.node("DequantizeLinear", inputs, {"axis": axis, "block_size": block}, name="dq")
    last = node
    if transposed:
        last = ir.node("Transpose", [node.outputs[0]], {"perm": [1, 0]}, name="t")
    ir.Graph(
        [],
        [last.outputs[0]],
        nodes=[node] if last is node else [node, last],
        initializers=inputs,
        name="g",
    )
    return last.outputs[0]


SEVERAL = np.linspace(1, 2, 128, dtype=np.float32)


@pytest.mark.parametrize(
    ("value", "granularity"),
    [
        (weights(np.float32(1.0), axis=1), "tensor"),
        (weights(SEVERAL[:32], axis=1), "channel"),
        (weights(SEVERAL[:32], axis=-1), "channel"),
        (weights(SEVERAL[:64], axis=0), "input"),
        (weights(SEVERAL[:64].reshape(2, 32), axis=0, block=32), "group:32"),
        (weights(np.tile(SEVERAL[:32], (2, 1)), axis=0, block=32), "channel"),
        (weights(SEVERAL.reshape(64, 2), axis=1, block=16), "input"),
        (weights(SEVERAL[:32], axis=0, transposed=True), "channel"),
        (weights(SEVERAL[:64].reshape(32, 2), axis=1, block=32, transposed=True), "group:32"),
    ],
)
def test_what_shares_a_scale_of_weights(value: ir.Value, granularity: str) -> None:
    found = stored(value, 1)
    assert found is not None
    assert (found.dtype, found.expanded_by, found.columns) == ("int8", "dq", 64)
    assert found.granularity == granularity


def test_blocks_of_equal_scales_are_a_channel() -> None:
    table = SEVERAL.reshape(32, 4)
    assert scales_of_blocks(table, 16) == "group:16"
    assert scales_of_blocks(np.tile(table[:, :1], 4), 16) == "channel"
    assert scales_of_blocks(np.ones((32, 4), np.float32), 16) == "tensor"
    assert scales_of_blocks(np.ones((1, 4), np.float32), 16) == "channel"
