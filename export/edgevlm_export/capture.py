"""Captures a torch module as an ONNX graph whose nodes are our ops, named by their sites."""

from __future__ import annotations

import inspect
import logging
import warnings

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from torch import nn

from edgevlm_export.naming import name_interface, name_sites
from edgevlm_export.plan import GraphPlan
from edgevlm_export.rewrites.constant_shapes import ConstantShapes
from edgevlm_export.translations import translation_table
from edgevlm_runtime.manifest import TensorSpec

CAPTURE_OPSET = 18  # what the exporter's own translations are written in
SITES = "edgevlm.sites"  # key of model.meta: the module paths that nodes may be named after

_EXPORTER_LOGGER = logging.getLogger("torch.onnx._internal.exporter")
_CLEANUP = (
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    ConstantShapes(),
    IdentityEliminationPass(),
    RemoveUnusedNodesPass(),
)


def capture(module: nn.Module, plan: GraphPlan) -> ir.Model:
    """The graph of `module` with the inputs and outputs of `plan`; weights are not copied."""
    model = _translate(_export(module.eval(), plan))
    for node in model.graph:
        if node.op_type == "Split" and len(node.inputs) > 1:
            node.attributes.pop("num_outputs", None)
    for cleanup in _CLEANUP:
        cleanup(model)
    sites = frozenset(name for name, _ in module.named_modules() if name)
    name_sites(model, sites)
    name_interface(model, plan)
    model.graph.name = plan.name
    model.meta[SITES] = sites
    return model


def _export(module: nn.Module, plan: GraphPlan) -> torch.export.ExportedProgram:
    """Trace with examples made from the plan's shapes; their values do not matter."""
    names = sorted({d for spec in plan.inputs for d in spec.shape if isinstance(d, str)})
    sizes = {name: 3 + i for i, name in enumerate(names)}  # apart from each other, and not 1
    sizes |= plan.examples
    marks = {name: torch.export.Dim(name) for name in names}
    examples = tuple(_example(spec, sizes) for spec in plan.inputs)
    dynamic = tuple(
        {i: marks[d] for i, d in enumerate(spec.shape) if isinstance(d, str)}
        for spec in plan.inputs
    )
    shapes = inspect.signature(module.forward).bind(*dynamic).arguments
    with torch.no_grad():
        return torch.export.export(module, examples, dynamic_shapes=shapes)


def _example(spec: TensorSpec, sizes: dict[str, int]) -> torch.Tensor:
    shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _translate(program: torch.export.ExportedProgram) -> ir.Model:
    level = _EXPORTER_LOGGER.level
    _EXPORTER_LOGGER.setLevel(logging.ERROR)  # it warns about torchvision, which nobody needs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch's own exporter
            exported = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table=translation_table(),
                opset_version=CAPTURE_OPSET,
                optimize=False,
                verbose=False,
            )
    finally:
        _EXPORTER_LOGGER.setLevel(level)
    assert exported is not None
    return exported.model
