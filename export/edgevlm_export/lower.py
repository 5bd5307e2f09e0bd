"""Turns a captured graph into the form its target runs."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from edgevlm_export.invariants import Stage, check
from edgevlm_export.ops.quant_qdq import needed_opset
from edgevlm_export.targets import Target


def lower(model: ir.Model, target: Target) -> ir.Model:
    """A new graph in the target's ops; `model` stays as it is, and both share their weights."""
    lowered = model.clone()
    lowered.meta.update(model.meta)
    lowered.opset_imports[""] = max(target.form.opset, needed_opset(model.graph))
    for count, rewrite in enumerate(target.rewrites, start=1):
        lowered = rewrite(lowered).model
        RemoveUnusedNodesPass()(lowered)
        if target.static_shapes:
            # Values are not followed: arithmetic of row numbers is no arithmetic of shapes.
            ShapeInferencePass(data_prop=False)(lowered)
        done = target.rewrites[:count]
        check(Stage(model=lowered, captured=model, target=target, done=done))
    for node in lowered.graph:
        lowered.opset_imports.setdefault(node.domain, 1)
    return lowered
