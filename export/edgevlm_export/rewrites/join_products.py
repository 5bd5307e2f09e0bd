"""Quantized products of one input become one, in steps that read a cache.

    gate = quant_linear(x, G);  up = quant_linear(x, U)
    gate, up = Split(quant_linear(x, G|U))

A step of one row waits for its threads at every product, and there are fewer of them: the step of a
decoder of 362 M parameters in int4 takes 0.975 [0.964, 0.986] of the time on two cores. Only what
becomes `MatMulNBits` is joined: products of integers are for many rows, where the split is a copy.
Each part keeps the name of its output, so that sites stay visible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import DOMAIN, dims, static_dims, tensors
from edgevlm_export.ops.packing import lazy
from edgevlm_export.ops.quant_product import is_nbits

WEIGHT, NUM_INPUTS = 1, 5
"""Inputs from the weight on, up to the bias, have a row (or a number) for each output.

The constants of activations behind them are for other forms: here none are rounded by constants.
"""
CACHED = ("cached_attention", "bottleneck_attention")
"""Ops of steps that extend a cache: all of them join, so that they share what is joined."""


class JoinProducts(ir.passes.InPlacePass):
    """One product for maps that read the same rows."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Join wherever two or more products of one kind read one value."""
        graph = model.graph
        found = False
        if any(node.domain == DOMAIN and node.op_type in CACHED for node in graph):
            for nodes in list(_groups(graph)):
                _join(graph, nodes)
                found = True
        return ir.passes.PassResult(model, found)


def _groups(graph: ir.Graph) -> Iterator[list[ir.Node]]:
    """Products of one input and one kind, where there are several."""
    groups: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in graph:
        is_quantized = (node.domain, node.op_type) == (DOMAIN, "quant_linear")
        if is_quantized and is_nbits(node) and not node.outputs[0].is_graph_output():
            groups.setdefault(_kind(node), []).append(node)
    return (nodes for nodes in groups.values() if len(nodes) > 1)


def _kind(node: ir.Node) -> tuple[object, ...]:
    """What products have in common that can be one."""
    inputs = tensors(node, NUM_INPUTS)
    given = tuple(value is not None for value in inputs)
    options = tuple(sorted((name, item.value) for name, item in node.attributes.items()))
    return inputs[0], static_dims(inputs[WEIGHT])[1], given, options


def _join(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Put one product and a split in the place of several."""
    first, last = nodes[0], nodes[-1]
    outputs = [node.outputs[0] for node in nodes]
    name = f"{first.name}/joined"
    emit = Emitter(graph, first)
    inputs = [
        _stacked(emit, nodes, index) if value is not None and index >= WEIGHT else value
        for index, value in enumerate(first.inputs[:NUM_INPUTS])
    ]
    options = {key: item.value for key, item in first.attributes.items()}
    joined = ir.node(first.op_type, inputs, options, domain=DOMAIN, name=name)
    sizes = [static_dims(node.inputs[WEIGHT])[0] for node in nodes]
    whole = joined.outputs[0]
    whole.name, whole.type = name, outputs[0].type
    whole.shape = ir.Shape([*dims(outputs[0])[:-1], sum(sizes)])
    split = ir.node(
        "Split", [whole, emit.ints(*sizes)], {"axis": -1}, num_outputs=len(nodes), name=last.name
    )
    graph.insert_before(first, [joined, split])
    for old, new in zip(outputs, split.outputs, strict=True):
        kept, old.name = old.name, None
        new.name, new.shape, new.type = kept, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new)
    graph.remove(nodes, safe=True)


def _stacked(emit: Emitter, nodes: Sequence[ir.Node], index: int) -> ir.Value:
    """One initializer of the rows of several, made when it is written."""
    parts = [value for node in nodes if (value := node.inputs[index]) is not None]
    sizes = [static_dims(part) for part in parts]
    shape = [sum(size[0] for size in sizes), *sizes[0][1:]]
    return lazy(emit, f"{parts[0].name}/joined", parts, np.concatenate, parts[0].dtype, shape)
