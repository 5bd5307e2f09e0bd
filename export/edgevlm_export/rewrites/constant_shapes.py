"""Shapes that are known up to one dimension become constants.

    shape = Concat(Shape(x)[0], 16, 64);  y = Reshape(x, shape)
    y = Reshape(x, [-1, 16, 64])

torch.export computes every shape with a dynamic dimension, which costs a handful of nodes each.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgevlm_export.emit import Emitter


class ConstantShapes(ir.passes.InPlacePass):
    """Reshapes to shapes that inference knows."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Give each Reshape with at most one dynamic dimension a constant shape."""
        found = False
        for node in model.graph:
            if node.op_type != "Reshape" or node.outputs[0].shape is None:
                continue
            shape = node.inputs[1]
            if shape is not None and shape.const_value is not None:
                continue
            sizes = [size if isinstance(size, int) else -1 for size in node.outputs[0].shape]
            if sizes.count(-1) <= 1 and 0 not in sizes:
                node.replace_input_with(1, Emitter(model.graph, node).ints(*sizes))
                node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
                found = True
        if found:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, found)
