"""Taps: values inside a written graph made visible as outputs, to find where it diverges."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from edgevlm_export.errors import ExportError

_TAP = "edgevlm.tap."  # prefix of metadata keys


def record_tap(model: ir.Model, site: str, parts: Sequence[str], bias: str | None = None) -> None:
    """Note how the output of a site is computed from values that the graph still has.

    The parts side by side, plus the bias. A graph output keeps its own name; a projection may have
    become several; and a bias that was fused into a later node is missing from the site's value.
    """
    model.metadata_props[_TAP + site] = json.dumps({"parts": list(parts), "bias": bias})


def is_site(value: ir.Value) -> bool:
    """Whether a value is what a site gives, by its name: it has no part behind a slash or colon."""
    return bool(value.name) and "/" not in str(value.name) and ":" not in str(value.name)


def tapped_sites(model: ir.Model) -> tuple[str, ...]:
    """The sites whose outputs `with_outputs` can show, in graph order."""
    recorded = {key.removeprefix(_TAP) for key in model.metadata_props if key.startswith(_TAP)}
    interface = {value.name for value in model.graph.outputs}
    sites: dict[str, None] = {}
    for node in model.graph:
        for output in node.outputs:
            if is_site(output) and output.name not in interface:
                sites[str(output.name)] = None
        site = str(node.name).partition("/")[0]
        sites.update({site: None} if site in recorded else {})
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
        value = _value(model, name, values)
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


def _value(model: ir.Model, name: str, values: dict[str | None, ir.Value]) -> ir.Value | None:
    """The value of that name, computed again from what the graph has where it was fused away."""
    recorded = model.metadata_props.get(_TAP + name)
    if name in values or recorded is None:
        return values.get(name)
    tap = json.loads(recorded)
    parts = [_value(model, part, values) for part in tap["parts"]]
    first = parts[0]
    assert first is not None
    whole = ir.node("Concat", parts, {"axis": -1}, name=f"plumbing/tap/{name}")
    model.graph.append(whole)
    if tap["bias"] is not None:
        inputs = [whole.outputs[0], values[tap["bias"]]]
        whole.outputs[0].name = f"plumbing/tap/{name}"
        whole = ir.node("Add", inputs, name=f"plumbing/tap/{name}/bias")
        model.graph.append(whole)
    output = whole.outputs[0]
    output.name, output.type = name, first.type
    values[name] = output
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
