"""A packed projection before stateless attention becomes three.

    attention(linear(x, W, b))
    attention(linear(x, W[q], b[q]), linear(x, W[k], b[k]), linear(x, W[v], b[v]))

With hundreds of rows, splitting the packed result costs a copy of it, and the three products cost
what the one did. Attention over a cache stays packed: with one row, fewer nodes win.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import DOMAIN, attribute, dims, tensors
from edgevlm_export.taps import record_tap

PARTS = ("q", "k", "v")

_LINEAR = {"linear": (1, 2), "quant_linear": (1, 2, 3, 4)}
"""Ops of projections, with the inputs that have a row (or a number) for each output."""


class SplitPacked(ir.passes.InPlacePass):
    """Three projections for stateless attention."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Split each packed linear map that only an attention reads."""
        found = False
        for node in model.graph:
            linear = _packed_linear(node)
            if linear is not None:
                _split(model, linear, node)
                found = True
        return ir.passes.PassResult(model, found)


def _packed_linear(node: ir.Node) -> ir.Node | None:
    """The linear map whose rows q|k|v an attention reads, and nothing else does."""
    if (node.domain, node.op_type) != (DOMAIN, "attention") or tensors(node, 2)[1] is not None:
        return None
    packed = node.inputs[0]
    linear = packed.producer() if packed is not None else None
    if packed is None or linear is None or linear.domain != DOMAIN:
        return None
    if linear.op_type not in _LINEAR:
        return None
    return linear if len(packed.uses()) == 1 and not packed.is_graph_output() else None


def _split(model: ir.Model, linear: ir.Node, attention: ir.Node) -> None:
    num_heads, num_kv_heads = (
        attribute(attention, "num_heads"),
        attribute(attention, "num_kv_heads"),
    )
    packed = linear.outputs[0]
    *batch, width = dims(packed)
    assert isinstance(width, int)
    size = width // (num_heads + 2 * num_kv_heads)
    ends = np.cumsum([num_heads * size, num_kv_heads * size, num_kv_heads * size])
    names = []
    sliced = _LINEAR[linear.op_type]
    for part, (start, end) in zip(PARTS, itertools.pairwise([0, *ends.tolist()]), strict=True):
        name = f"{linear.name}/{part}"
        emit = Emitter(model.graph, linear)
        inputs = [
            rows(emit, value, part, start, end) if value is not None and i in sliced else value
            for i, value in enumerate(linear.inputs)
        ]
        attributes = {name: attribute.value for name, attribute in linear.attributes.items()}
        split = ir.node(linear.op_type, inputs, attributes, domain=DOMAIN, name=name)
        output = split.outputs[0]
        output.name, output.type, output.shape = name, packed.type, ir.Shape([*batch, end - start])
        model.graph.insert_before(linear, split)
        names.append(name)
        if part == "q":
            attention.resize_inputs(max(3, len(attention.inputs)))
        attention.replace_input_with(PARTS.index(part), output)
    assert linear.name is not None
    model.graph.remove(linear, safe=True)
    record_tap(model, linear.name, names)


def rows(emit: Emitter, value: ir.Value, part: str, start: int, end: int) -> ir.Value:
    """The initializer value[start:end], evaluated when it is written."""
    tensor = value.const_value
    assert tensor is not None, f"{value.name} is not a constant"
    name = f"{value.name}/{part}"
    return emit.initializer(
        name,
        lambda: ir.LazyTensor(
            lambda: ir.tensor(tensor.numpy()[start:end], name=name),
            dtype=tensor.dtype,
            shape=ir.Shape([end - start, *tensor.shape.numpy()[1:]]),
            name=name,
        ),
    )
