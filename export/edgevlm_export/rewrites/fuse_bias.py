"""The bias of a projection moves into the node that reads it.

    y = Add(x, bias);  z = Gelu(y)                    z = BiasGelu(x, bias)
    y = Add(x, bias);  z = FastGelu(y)                z = FastGelu(x, bias)
    y = Add(x, bias);  z = SkipLayerNormalization(r, y, weight, beta)
                                        z = SkipLayerNormalization(r, x, weight, beta, bias)

The value y, a site's output, is gone from the graph then; a tap says how to compute it again.
"""

from __future__ import annotations

import onnx_ir as ir

from edgevlm_export.ops.op import MICROSOFT
from edgevlm_export.taps import record_tap

# Op type -> fused op type, input that the bias is added to, input that the bias becomes.
_FUSED = {
    "Gelu": ("BiasGelu", 0, 1),
    "FastGelu": ("FastGelu", 0, 1),
    "SkipLayerNormalization": ("SkipLayerNormalization", 1, 4),
}


class FuseBias(ir.passes.InPlacePass):
    """Bias adds into the fused ops that take a bias."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse each bias whose sum has one reader."""
        found = False
        for node in model.graph:
            if node.domain != MICROSOFT or node.op_type not in _FUSED:
                continue
            op_type, source, place = _FUSED[node.op_type]
            add = _bias_add(node, source)
            if add is None or len(node.inputs) > place:
                continue
            x, bias = add.inputs
            assert x is not None
            assert bias is not None
            total = add.outputs[0]
            assert x.name is not None
            assert bias.name is not None
            assert total.name is not None
            x.shape, x.type = total.shape, total.type
            node.resize_inputs(place + 1)
            node.replace_input_with(source, x)
            node.replace_input_with(place, bias)
            node.op_type = op_type
            model.graph.remove(add, safe=True)
            record_tap(model, total.name, "Add", x.name, bias.name)
            found = True
        return ir.passes.PassResult(model, found)


def _bias_add(node: ir.Node, source: int) -> ir.Node | None:
    """The add of a bias that only this node reads."""
    value = node.inputs[source]
    add = value.producer() if value is not None else None
    if value is None or add is None or add.op_type != "Add" or add.domain:
        return None
    bias = add.inputs[1]
    if bias is None or bias.const_value is None or len(bias.const_value.shape) != 1:
        return None
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return add if alone else None
