"""Turns a captured graph into the form its target runs."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgevlm_export.targets import Target


def lower(model: ir.Model, target: Target) -> ir.Model:
    """A new graph in the target's ops; `model` stays as it is, and both share their weights."""
    lowered = model.clone()
    lowered.meta.update(model.meta)
    lowered.opset_imports[""] = target.form.opset
    for rewrite in target.rewrites:
        rewrite(lowered)
    RemoveUnusedNodesPass()(lowered)
    for node in lowered.graph:
        if node.domain and node.domain not in lowered.opset_imports:
            lowered.opset_imports[node.domain] = 1
    return lowered
