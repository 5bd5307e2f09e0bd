"""Shapes that are known up to one dimension become constants.

    shape = Concat(Shape(x)[0], 16, 64);  y = Reshape(x, shape)         y = Reshape(x, [-1, 16, 64])
    y = Reshape(x, shape), y of the shape of x                          y = x

torch.export computes every shape with a dynamic dimension, which costs a handful of nodes each.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgevlm_export.emit import Emitter


class ConstantShapes(ir.passes.InPlacePass):
    """Reshapes to shapes that inference knows."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Give each Reshape with at most one dynamic dimension a constant shape, or drop it."""
        found = [node for node in model.graph if node.op_type == "Reshape" and _is_known(node)]
        for node in found:
            x, out = node.inputs[0], node.outputs[0]
            assert x is not None
            assert out.shape is not None
            if x.shape == out.shape and not out.is_graph_output():
                ir.convenience.replace_all_uses_with(out, x)
                continue
            sizes = [size if isinstance(size, int) else -1 for size in out.shape]
            node.replace_input_with(1, Emitter(model.graph, node).ints(*sizes))
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        if found:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(found))


def _is_known(node: ir.Node) -> bool:
    shape = node.outputs[0].shape
    if shape is None:
        return False
    dynamic = [size for size in shape if not isinstance(size, int)]
    return len(dynamic) <= 1 and 0 not in shape
