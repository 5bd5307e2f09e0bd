"""The bias of a projection moves into the node that reads it.

    z = Gelu(x + bias)                              z = BiasGelu(x, bias)
    z = FastGelu(x + bias)                          z = FastGelu(x, bias)
    z = MultiHeadAttention(q + a, k + b, v + c)     z = MultiHeadAttention(q, k, v, a|b|c)

The sums, outputs of sites, are gone from the graph then; taps say how to compute them again.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import MICROSOFT
from edgevlm_export.taps import record_tap

# Op type -> fused op type, inputs that biases are added to, input that the bias becomes.
_FUSED = {
    "Gelu": ("BiasGelu", (0,), 1),
    "FastGelu": ("FastGelu", (0,), 1),
    "MultiHeadAttention": ("MultiHeadAttention", (0, 1, 2), 3),
}


class FuseBias(ir.passes.InPlacePass):
    """Bias adds into the fused ops that take a bias."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse the biases whose sums have one reader."""
        found = False
        for node in model.graph:
            if node.domain != MICROSOFT or node.op_type not in _FUSED:
                continue
            op_type, sources, place = _FUSED[node.op_type]
            adds = [_bias_add(node, source) for source in sources]
            free = len(node.inputs) <= place or node.inputs[place] is None
            if free and all(adds) and _are_one_site(adds):
                _fuse(model, node, [add for add in adds if add], sources, place)
                node.op_type = op_type
                found = True
        return ir.passes.PassResult(model, found)


def _are_one_site(adds: list[ir.Node | None]) -> bool:
    """Whether the sums are the output of one site: one sum, or the parts of one projection."""
    names = [str(add.outputs[0].name).rpartition("/")[0] for add in adds if add]
    return len(adds) == 1 or (bool(names[0]) and len(set(names)) == 1)


def _bias_add(node: ir.Node, source: int) -> ir.Node | None:
    """The add of a bias that only this node reads."""
    value = node.inputs[source] if source < len(node.inputs) else None
    add = value.producer() if value is not None else None
    if value is None or add is None or add.op_type != "Add" or add.domain:
        return None
    bias = add.inputs[1]
    if bias is None or bias.const_value is None or len(bias.const_value.shape) != 1:
        return None
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return add if alone else None


def _fuse(
    model: ir.Model, node: ir.Node, adds: list[ir.Node], sources: tuple[int, ...], place: int
) -> None:
    """Let the node read what the biases were added to, and the biases side by side."""
    bias = _joined_bias(model.graph, node, adds)
    parts = []
    for source, add in zip(sources, adds, strict=True):
        x, total = add.inputs[0], add.outputs[0]
        assert x is not None
        x.shape, x.type = total.shape, total.type
        node.replace_input_with(source, x)
        model.graph.remove(add, safe=True)
        parts.append(str(x.name))
    node.resize_inputs(max(place + 1, len(node.inputs)))
    node.replace_input_with(place, bias)
    record_tap(model, _site([add.outputs[0] for add in adds]), parts, bias.name)


def _joined_bias(graph: ir.Graph, node: ir.Node, adds: list[ir.Node]) -> ir.Value:
    """The one bias, or all of them side by side in a new initializer."""
    biases = [add.inputs[1] for add in adds]
    if len(biases) == 1:
        assert biases[0] is not None
        return biases[0]
    constants = [bias.const_value for bias in biases if bias is not None and bias.const_value]
    name = f"{_site([add.outputs[0] for add in adds])}.bias"
    return Emitter(graph, node).initializer(
        name, lambda: ir.tensor(np.concatenate([x.numpy() for x in constants]), name=name)
    )


def _site(totals: list[ir.Value]) -> str:
    """The site whose output the sums are; three sums are the parts of a packed projection."""
    names = [str(total.name) for total in totals]
    return names[0] if len(names) == 1 else names[0].rpartition("/")[0]
