"""Quantized products of one input become one product, where rows are few."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgevlm_export.ops.op import DOMAIN
from edgevlm_export.rewrites.join_products import JoinProducts
from edgevlm_export.rewrites.lower_ops import LowerOps
from tests.export.running import model_of, nodes, run, seeded

COLUMNS, SIZES = 64, {"a.gate": 24, "a.up": 40}
KIND = ir.TensorType(ir.DataType.FLOAT)
WEIGHTS_ALONE = {"bits": 4, "group_size": 32, "x_dtype": "", "x_scales": ""}
SIXTEEN = WEIGHTS_ALONE | {"x_dtype": "int16", "x_scales": "static"}
BLOCKS = WEIGHTS_ALONE | {"x_dtype": "int8", "x_scales": "block"}
TOKENS = {"bits": 8, "group_size": 0, "x_dtype": "int8", "x_scales": "token"}


def constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(
        name=name,
        const_value=tensor,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
    )


def graph(
    *options: dict[str, Any], zero: bool = False, bias: bool = False, cached: bool = True
) -> ir.Model:
    """Two maps of one input, whose outputs are added up; a cache is read where a step reads one."""
    random = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape([1, "T", COLUMNS]), type=KIND)
    made, constants, flat = [], [], []
    for (site, rows), each in zip(SIZES.items(), options, strict=True):
        groups = COLUMNS // (each["group_size"] or COLUMNS)
        limit = 1 << (each["bits"] - 1)
        values = random.integers(-limit, limit, (rows, COLUMNS), dtype=np.int8)
        inputs: list[ir.Value | None] = [
            constant(f"{site}.weight", values),
            constant(f"{site}.scale", random.random((rows, groups), dtype=np.float32) / 50),
            constant(f"{site}.zero", values[:, :groups]) if zero else None,
            constant(f"{site}.bias", values[:, 0].astype(np.float32)) if bias else None,
        ]
        if each["x_scales"] == "static":
            # Constants that the form of standard ops reads: float activations do without.
            inputs.append(constant(f"{site}.x_scale", np.array(0.1, np.float32)))
            inputs.append(constant(f"{site}.x_zero", np.array(3, np.int32)))
        constants += [value for value in inputs if value is not None]
        node = ir.node("quant_linear", [x, *inputs], each, domain=DOMAIN, name=site)
        out = node.outputs[0]
        out.name, out.shape, out.type = site, ir.Shape([1, "T", rows]), KIND
        made.append(node)
        flat.append(ir.node("ReduceSum", [out], {"keepdims": 0}, name=f"{site}/sum"))
    both = ir.node("Add", [flat[0].outputs[0], flat[1].outputs[0]], name="b")
    outputs = [both.outputs[0]]
    outputs[0].name, outputs[0].shape, outputs[0].type = "b", ir.Shape([]), KIND
    # Only its name is looked at: what makes a graph a step.
    reads = [ir.node("cached_attention", [], domain=DOMAIN, name="b")] if cached else []
    return model_of(
        ir.Graph(
            [x],
            outputs,
            nodes=[*reads, *made, *flat, both],
            initializers=constants,
            opset_imports={"": 21, DOMAIN: 1},
            name="graph",
        ),
        sites=(*SIZES, "b"),
    )


def lowered(model: ir.Model) -> ir.Model:
    """The graph in fused ops, without the mark of a step."""
    for node in list(model.graph):
        if node.op_type == "cached_attention":
            model.graph.remove(node)
    made = LowerOps(("contrib", "standard"))(model).model
    made.graph.opset_imports["com.microsoft"] = 1
    return made


@pytest.mark.parametrize(
    "options",
    [WEIGHTS_ALONE, BLOCKS, SIXTEEN],
    ids=["weights alone", "blocks", "16 bits, for another target too"],
)
@pytest.mark.parametrize(("zero", "bias"), [(False, False), (True, True)])
def test_two_maps_become_one_bit_for_bit(options: dict[str, Any], zero: bool, bias: bool) -> None:
    model = graph(options, options, zero=zero, bias=bias)
    assert JoinProducts()(model).modified
    joined = lowered(model)
    ops = [node.op_type for node in joined.graph]
    assert ops.count("MatMulNBits") == 1
    assert "a.up: a.gate, a.up = Split(" in "\n".join(nodes(joined))
    apart = lowered(graph(options, options, zero=zero, bias=bias))
    assert [node.op_type for node in apart.graph].count("MatMulNBits") == 2
    for rows in (1, 3):
        feeds = {"x": seeded(1, rows, COLUMNS).numpy()}
        for site in (*SIZES, "b"):
            ours, theirs = (run(_with_output(each, site), feeds)[site] for each in (joined, apart))
            # Rows of a product do not see each other.
            np.testing.assert_array_equal(ours, theirs)


def _with_output(model: ir.Model, site: str) -> ir.Model:
    """A copy in which a value is an output."""
    copy = model.clone()
    values = {str(out.name): out for node in copy.graph for out in node.outputs}
    if not values[site].is_graph_output():
        copy.graph.outputs.append(values[site])
    return copy


@pytest.mark.parametrize(
    "model",
    [
        graph(TOKENS, TOKENS),
        graph(WEIGHTS_ALONE, BLOCKS),
        graph(WEIGHTS_ALONE, WEIGHTS_ALONE | {"group_size": 64}),
        graph(WEIGHTS_ALONE, WEIGHTS_ALONE | {"bits": 8}),
        graph(WEIGHTS_ALONE, WEIGHTS_ALONE, cached=False),
    ],
    ids=["products of integers", "other activations", "other groups", "other bits", "no step"],
)
def test_other_products_stay(model: ir.Model) -> None:
    before = nodes(model)
    assert not JoinProducts()(model).modified
    assert nodes(model) == before
