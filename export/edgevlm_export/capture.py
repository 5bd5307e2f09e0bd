"""Captures a torch module as an ONNX graph whose nodes are our ops, named by their sites.

A node is named after the module whose forward made it (`decoder.layers.3.mlp.down`), or
`site/part` where a module makes several; the value that leaves the module is named exactly `site`.
Nodes of no module are `plumbing/part`. Graph inputs and outputs have the names of the plan; the
site that a graph output belongs to is recorded with the model (see `taps`).
"""

from __future__ import annotations

import ast
import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxscript import opset18
from onnxscript.values import Opset
from torch import nn

from edgevlm_export.emit import PLUMBING
from edgevlm_export.ops.op import DOMAIN, Op
from edgevlm_export.ops.table import OPS
from edgevlm_export.plan import GraphPlan
from edgevlm_export.taps import record_tap
from edgevlm_runtime.manifest import TensorSpec

CAPTURE_OPSET = 18  # what the exporter's own translations are written in
SITES = "edgevlm.sites"  # key of model.meta: the module paths that nodes may be named after

_EXPORTER_LOGGER = logging.getLogger("torch.onnx._internal.exporter")


def capture(module: nn.Module, plan: GraphPlan) -> ir.Model:
    """The graph of `module` with the inputs and outputs of `plan`; weights are not copied."""
    program = _export(module.eval(), plan)
    model = _translate(program)
    sites = frozenset(name for name, _ in module.named_modules() if name)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _name_sites(model, sites)
    _name_interface(model, plan)
    model.graph.name = plan.name
    model.meta[SITES] = sites
    return model


def _export(module: nn.Module, plan: GraphPlan) -> torch.export.ExportedProgram:
    """Trace with examples made from the plan's shapes; their values do not matter."""
    names = sorted({d for spec in plan.inputs for d in spec.shape if isinstance(d, str)})
    sizes = {name: 3 + i for i, name in enumerate(names)}  # apart from each other, and not 1
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
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        op.overload: _translation(op) for op in OPS.values()
    }
    table[torch.ops.aten.index_select.default] = _translate_index_select
    level = _EXPORTER_LOGGER.level
    _EXPORTER_LOGGER.setLevel(logging.ERROR)  # it warns about torchvision, which nobody needs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch's own exporter
            exported = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table=table,
                opset_version=CAPTURE_OPSET,
                optimize=False,
                verbose=False,
            )
    finally:
        _EXPORTER_LOGGER.setLevel(level)
    assert exported is not None
    return exported.model


def _translation(op: Op) -> Callable[..., Any]:
    """The function that the exporter calls to turn a call of the torch op into our node."""
    if not onnx.defs.has(op.name, DOMAIN):
        onnx.defs.register_schema(op.schema())
    opset = Opset(DOMAIN, 1)
    arguments = op.overload._schema.arguments

    def translate(*values: Any, **named: Any) -> Any:
        bound = {a.name: a.default_value for a in arguments if a.has_default_value()}
        bound |= dict(zip((a.name for a in arguments), values, strict=False)) | named
        tensors = [bound[name] for name in op.inputs]
        return getattr(opset, op.name)(*tensors, **{name: bound[name] for name in op.attributes})

    return translate


def _translate_index_select(x: Any, dim: int, index: Any) -> Any:
    """One Gather: the exporter's own form reshapes and casts the index for dtypes we never use."""
    return opset18.Gather(x, index, axis=dim)


def _name_sites(model: ir.Model, sites: frozenset[str]) -> None:
    """Name nodes and values after the modules they came from."""
    paths = {node: _module_path(node, sites) for node in model.graph}
    taken: dict[str, int] = {}
    num_nodes: dict[str, int] = {}
    for path in paths.values():
        num_nodes[path] = num_nodes.get(path, 0) + 1
    for node, path in paths.items():
        alone = path and num_nodes[path] == 1
        name = path if alone else f"{path or PLUMBING}/{node.op_type.lower()}"
        count = taken[name] = taken.get(name, -1) + 1
        name = f"{name}{'_' if alone else ''}{count}" if count else name
        node.name = name
        for i, output in enumerate(node.outputs):
            output.name = f"{name}:{i}" if i else name
        node.metadata_props.clear()

    named: set[str] = set()
    for node, path in paths.items():
        if path and path not in named and _leaves(node.outputs[0], path, paths):
            node.outputs[0].name = path
            named.add(path)


def _module_path(node: ir.Node, sites: frozenset[str]) -> str:
    """The innermost module a node was made in; empty for what torch.export adds by itself."""
    scopes: list[str] = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
    return scopes[-2] if len(scopes) > 1 and scopes[-2] in sites else ""


def _leaves(value: ir.Value, path: str, paths: dict[ir.Node, str]) -> bool:
    """Whether a value made in a module is used outside it."""
    users = [paths[node] for node in value.consumers()]
    inside = all(user == path or user.startswith(f"{path}.") for user in users)
    return value.is_graph_output() or not inside


def _name_interface(model: ir.Model, plan: GraphPlan) -> None:
    """Give graph inputs, outputs and dynamic dimensions the names of the plan."""
    graph = model.graph
    assert len(graph.inputs) == len(plan.inputs), f"{plan.name}: an input is not used by forward"
    assert len(graph.outputs) == len(plan.outputs)
    symbols: dict[str, str] = {}
    for value, spec in zip(graph.inputs, plan.inputs, strict=True):
        value.name = spec.name
        assert value.shape is not None
        for found, named in zip(value.shape, spec.shape, strict=True):
            if isinstance(found, ir.SymbolicDim) and isinstance(named, str):
                symbols[str(found.value)] = named
        value.metadata_props.clear()
    for value, spec in zip(graph.outputs, plan.outputs, strict=True):
        assert value.name is not None
        if value.producer() is not None and ":" not in value.name and "/" not in value.name:
            record_tap(model, value.name, [spec.name])
        value.name = spec.name
        value.metadata_props.clear()
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape(
                symbols.get(str(d.value), d.value) if isinstance(d, ir.SymbolicDim) else d
                for d in value.shape
            )
    for name, default in plan.defaults.items():
        value = next(v for v in graph.inputs if v.name == name)
        value.const_value = ir.tensor(default, name=name)
        graph.register_initializer(value)
    graph.metadata_props.clear()


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(output for node in graph for output in node.outputs)]
