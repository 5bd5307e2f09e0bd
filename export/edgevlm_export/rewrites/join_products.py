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
from edgevlm_export.ops.op import DOMAIN, attribute, dims, static_dims, tensors

WEIGHT, NUM_INPUTS = 1, 5
"""Inputs from the weight on, up to the bias, have a row (or a number) for each output."""


class JoinProducts(ir.passes.InPlacePass):
    """One product for maps that read the same rows."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Join wherever two or more products of one kind read one value."""
        graph = model.graph
        found = False
        if any((node.domain, node.op_type) == (DOMAIN, "cached_attention") for node in graph):
            for nodes in list(_groups(graph)):
                _join(graph, nodes)
                found = True
        return ir.passes.PassResult(model, found)


def _groups(graph: ir.Graph) -> Iterator[list[ir.Node]]:
    """Products of one input and one kind, where there are several."""
    groups: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in graph:
        if (node.domain, node.op_type) == (DOMAIN, "quant_linear") and _reads_blocks(node):
            groups.setdefault(_kind(node), []).append(node)
    return (nodes for nodes in groups.values() if len(nodes) > 1)


def _reads_blocks(node: ir.Node) -> bool:
    """Whether it becomes `MatMulNBits`, and its output is no output of the graph."""
    weight = node.inputs[WEIGHT]
    is_wide = attribute(node, "x_dtype") in ("", "int16")
    return (
        weight is not None
        and weight.dtype == ir.DataType.INT8
        and (is_wide or attribute(node, "x_scales") == "block")
        and not node.outputs[0].is_graph_output()
    )


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
        for index, value in enumerate(first.inputs)
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
    parts = []
    for node in nodes:
        value = node.inputs[index]
        assert value is not None
        assert value.const_value is not None, f"{value.name} is not a constant"
        parts.append(value.const_value)
    first = nodes[0].inputs[index]
    assert first is not None
    name = f"{first.name}/joined"
    shape = [sum(part.shape.numpy()[0] for part in parts), *parts[0].shape.numpy()[1:]]

    def tensor() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([part.numpy() for part in parts]), name=name)

    return emit.initializer(
        name,
        lambda: ir.LazyTensor(tensor, dtype=parts[0].dtype, shape=ir.Shape(shape), name=name),
    )
