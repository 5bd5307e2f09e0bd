"""Taps: values inside a written graph made visible as outputs, to find where it diverges."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from edgevlm_export.errors import ExportError

_TAP = "edgevlm.tap."  # prefix of metadata keys


def record_tap(model: ir.Model, site: str, op_type: str, *inputs: str) -> None:
    """Note how the output of a site is computed from values that the graph still has.

    A graph output keeps its own name (Identity), and a bias that was fused into a later node leaves
    the site's value without it (Add).
    """
    model.metadata_props[_TAP + site] = json.dumps({"op": op_type, "inputs": list(inputs)})


def tapped_sites(model: ir.Model) -> tuple[str, ...]:
    """The sites whose outputs `with_outputs` can show, in graph order."""
    recorded = {key.removeprefix(_TAP) for key in model.metadata_props if key.startswith(_TAP)}
    sites: dict[str, None] = {}
    for node in model.graph:
        for name in (node.name, *(output.name for output in node.outputs)):
            if name and "/" not in name and ":" not in name:
                is_value = any(output.name == name for output in node.outputs)
                if is_value or name in recorded:
                    sites[name] = None
            elif name and name.partition("/")[0] in recorded:
                sites[name.partition("/")[0]] = None
    return tuple(sites)


def with_outputs(path_in: Path, names: Sequence[str], path_out: Path) -> None:
    """Write a copy of a graph in which values and sites of these names are outputs too.

    The copy shares the weight files: they are hard-linked beside it where it lies elsewhere.
    """
    model = ir.load(path_in)
    graph = model.graph
    values = {value.name: value for value in graph.inputs}
    values |= {output.name: output for node in graph for output in node.outputs}
    values |= {value.name: value for value in graph.initializers.values()}
    for name in names:
        value = values.get(name)
        tap = model.metadata_props.get(_TAP + name)
        if value is None and tap is not None:
            value = _recompute(graph, name, json.loads(tap), values)
        if value is None or value.type is None:
            raise ExportError(
                f"no value {name!r} in {path_in.name}",
                role=graph.name or path_in.stem,
                hint="name a site, or a value of the graph as `edgevlm inspect` lists them",
            )
        if not value.is_graph_output():
            graph.outputs.append(value)
    _link_weights(graph, path_in.parent, path_out.parent)
    path_out.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _recompute(
    graph: ir.Graph, name: str, tap: dict[str, object], values: dict[str | None, ir.Value]
) -> ir.Value:
    inputs = tap["inputs"]
    assert isinstance(inputs, list)
    sources = [values[source] for source in inputs]
    node = ir.node(str(tap["op"]), sources, name=f"plumbing/tap/{name}")
    output = node.outputs[0]
    output.name, output.shape, output.type = name, sources[0].shape, sources[0].type
    graph.append(node)
    return output


def _link_weights(graph: ir.Graph, source: Path, target: Path) -> None:
    files = {
        value.const_value.location
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    for file in sorted(str(file) for file in files):
        if not (target / file).exists():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            os.link(source / file, target / file)
