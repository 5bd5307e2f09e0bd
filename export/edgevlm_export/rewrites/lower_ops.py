"""Replaces every op of ours by the nodes of a form: the first of `forms` that the op has."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edgevlm_export.emit import Emitter
from edgevlm_export.errors import ExportError
from edgevlm_export.ops.op import DOMAIN, Lowering
from edgevlm_export.ops.table import OPS


class LowerOps(ir.passes.InPlacePass):
    """Our ops, in the forms that a target accepts."""

    def __init__(self, forms: Sequence[str]) -> None:
        """Prefer the forms in this order."""
        super().__init__()
        self.forms = tuple(forms)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower each node where it stands; names of sites and of graph outputs stay."""
        graph = model.graph
        found = [node for node in graph if node.domain == DOMAIN]
        for node in found:
            emit = Emitter(graph, node)
            outputs = self._lowering(graph, node)(emit, node)
            for old, new in zip(node.outputs, outputs, strict=True):
                if new is not None:
                    _take_place(old, new)
            if len(emit.nodes) == 1:
                emit.nodes[0].name = emit.site
            graph.remove(node, safe=True)
        model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, bool(found))

    def _lowering(self, graph: ir.Graph, node: ir.Node) -> Lowering:
        lowerings = OPS[node.op_type].lowerings
        for form in self.forms:
            if form in lowerings:
                return lowerings[form]
        raise ExportError(
            f"{node.name!r} is {node.op_type}, which has no form {' or '.join(self.forms)}",
            role=graph.name or "graph",
            op=node.op_type,
            hint=f"{node.op_type} exists as {', '.join(sorted(lowerings))}",
        )


def _take_place(old: ir.Value, new: ir.Value) -> None:
    """Give the new value the name, shape, type and uses of the old one."""
    name = old.name
    old.name = None
    new.name, new.shape, new.type = name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
