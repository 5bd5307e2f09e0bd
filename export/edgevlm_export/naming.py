"""Names of nodes and values: a node is named after the module whose forward made it.

    decoder.layers.3.mlp.down      the only node of that module
    decoder.layers.3/add           one of several
    plumbing/gather                a node of no module

The value that leaves a module is named exactly as the module, so evidence can compare it with a
forward hook. Graph inputs and outputs have the names of the plan; where one of those is a module's
output, a tap says so.
"""

from __future__ import annotations

import ast

import onnx_ir as ir

from edgevlm_export.emit import PLUMBING, constant_name
from edgevlm_export.plan import GraphPlan
from edgevlm_export.taps import is_site, record_tap


def name_sites(model: ir.Model, sites: frozenset[str]) -> None:
    """Name nodes and their values after the modules they came from."""
    paths = {node: _module_path(node, sites) for node in model.graph}
    num_nodes: dict[str, int] = {}
    for path in paths.values():
        num_nodes[path] = num_nodes.get(path, 0) + 1
    taken: dict[str, int] = {}
    named: set[str] = set()
    for node, path in paths.items():
        whole = bool(path) and path not in named and _leaves(node.outputs[0], path, paths)
        alone = whole and num_nodes[path] == 1
        name = path if alone else f"{path or PLUMBING}/{node.op_type.lower()}"
        count = taken[name] = taken.get(name, -1) + 1
        node.name = name = f"{name}{count or ''}"
        for i, output in enumerate(node.outputs):
            output.name = f"{name}:{i}" if i else name
        if whole:
            node.outputs[0].name = path
            named.add(path)
        node.metadata_props.clear()
    _name_constants(model.graph)


def _module_path(node: ir.Node, sites: frozenset[str]) -> str:
    """The innermost module a node was made in; empty for what torch.export adds by itself."""
    scopes: list[str] = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
    return scopes[-2] if len(scopes) > 1 and scopes[-2] in sites else ""


def _leaves(value: ir.Value, path: str, paths: dict[ir.Node, str]) -> bool:
    """Whether a value made in a module is used outside it."""
    users = [paths[node] for node in value.consumers()]
    inside = all(user == path or user.startswith(f"{path}.") for user in users)
    return value.is_graph_output() or not inside


def _name_constants(graph: ir.Graph) -> None:
    """Name the constants in the code of a forward after their value; parameters have names."""
    for value in list(graph.initializers.values()):
        value.metadata_props.clear()
        if value.name is not None and value.name.startswith("val_"):
            assert value.const_value is not None
            name = constant_name(value.const_value.numpy())
            known = graph.initializers.get(name)
            if known is None:
                value.name = name
            else:
                ir.convenience.replace_all_uses_with(value, known)
                graph.initializers.pop(value.name)


def name_interface(model: ir.Model, plan: GraphPlan) -> None:
    """Give graph inputs, outputs and dynamic dimensions the names of the plan."""
    graph = model.graph
    assert len(graph.inputs) == len(plan.inputs)
    assert len(graph.outputs) == len(plan.outputs)
    symbols: dict[str, str] = {}
    for value, spec in zip(graph.inputs, plan.inputs, strict=True):
        value.name = spec.name
        assert value.shape is not None
        for found, named in zip(value.shape, spec.shape, strict=True):
            if isinstance(found, ir.SymbolicDim) and isinstance(named, str):
                symbols[str(found.value)] = named
    for value, spec in zip(graph.outputs, plan.outputs, strict=True):
        if value.producer() is not None and is_site(value):
            record_tap(model, str(value.name), [spec.name])
        value.name = spec.name
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        value.metadata_props.clear()
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
