"""The audit of one graph of a bundle: what its model asks of it, held against what it does."""

from __future__ import annotations

import platform
from pathlib import Path

from edgevlm.audit.asked import asked_of, precision_of
from edgevlm.audit.audit import audit_graph
from edgevlm.audit.feeds import example_feeds, written_in_place
from edgevlm.audit.report import GraphAudit
from edgevlm.audit.table import audit_table
from edgevlm.model.spec import VlmSpec
from edgevlm_export.targets import TARGETS
from edgevlm_runtime.manifest import GraphSpec, Variant

__all__ = ["audit_of", "processor_key"]


def processor_key() -> str:
    """What kernels are chosen by: the processor's name and its instructions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    telling = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return "\n".join((platform.machine(), platform.processor(), *sorted(telling)))


def audit_of(spec: VlmSpec, variant: Variant, graph: GraphSpec, folder: Path) -> GraphAudit:
    """Audit a graph in the folder of its bundle; a form of fixed shapes is emulated here."""
    if graph.role == "embedding":
        table = spec.table
        asked = {} if table is None else {graph.name: precision_of(table, emulated=False)}
        return audit_table(folder, graph, asked)
    tensors = [tensor for group in variant.state for tensor in group.tensors]
    renewed = {tensor.output: tensor.name for tensor in tensors}
    is_inplace = tensors[0].kind == "kv_inplace"
    return audit_graph(
        folder / graph.file,
        graph,
        example_feeds(graph, variant.state[0].capacity, spec.entering),
        asked_of(spec, graph, emulated=bool(TARGETS[variant.target].form.rows)),
        in_place=written_in_place(graph, renewed) if is_inplace else None,
    )
