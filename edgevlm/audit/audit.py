"""The audit of a written graph: what was asked of its sites, held against what ran.

It knows nothing of how the graph came to be. It reads the file, has ONNX Runtime load it with the
options of the manifest, and reads what that made of it: its optimized graph and a profile. An op of
the one is an op of the other if it has the same name, or writes the same value, and an op that lost
its name has no time: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from edgevlm.audit.judge import as_judged, judge, judge_unasked
from edgevlm.audit.observe import Feeds, KernelTime, RefusalError, observe, session_options
from edgevlm.audit.precision import Precision
from edgevlm.audit.probe import Kernels
from edgevlm.audit.report import NOT_REALISED, Gone, GraphAudit, OpAudit
from edgevlm.audit.rules import realise
from edgevlm.audit.weights import is_product, weights_of
from edgevlm_runtime.manifest import GraphSpec

__all__ = ["audit_graph"]


def audit_graph(
    path: Path,
    graph: GraphSpec,
    feeds: Feeds,
    asked: Mapping[str, Precision],
    *,
    in_place: Mapping[str, str] | None = None,
    runs: int = 3,
) -> GraphAudit:
    """Audit the graph in a file, which is run on `feeds` once more than `runs`.

    `asked` is by site, the part of a node's name before its first slash; what is not in it is to be
    of floats. Outputs `in_place` are written over the inputs of these names, as the runtime does.
    A graph that the engine refuses is reported, not raised.
    """
    engine = f"onnxruntime {ort.__version__}"
    written = ir.load(path)
    try:
        with observe(path, graph, feeds, in_place=in_place or {}, runs=runs) as seen:
            kernels = Kernels(partial(session_options, graph))
            pairs = _Pairs.of(written.graph, seen.model.graph)
            rows = [_row(node, pairs, seen.kernels, kernels, asked) for node in seen.model.graph]
            gone = tuple(
                Gone(name=str(node.name), op=node.op_type, fate=_fate(node, pairs))
                for node in written.graph
                if node.op_type != "Constant" and node not in pairs.kept
            )
            rows += _parts(seen.model.graph, pairs, kernels, asked, rows)
            rows += _missing(asked, rows, gone)
            rows += _unmatched(seen.kernels, seen.model.graph)
            weight_bytes = sum(map(_bytes, seen.model.graph.initializers.values()))
            microseconds = seen.microseconds
    except RefusalError as error:
        refused = f"{engine} refuses the graph: {error.message}"
        rows = [
            OpAudit(name=site, site=site, asked=precision, outcome=NOT_REALISED, cause=refused)
            for site, precision in asked.items()
        ]
        return GraphAudit(
            graph=graph.name, engine=engine, runs=0, rows=tuple(rows), refused=refused
        )
    whole = sum(row.microseconds or 0.0 for row in rows) or 1.0
    return GraphAudit(
        graph=graph.name,
        engine=engine,
        runs=runs,
        rows=tuple(replace(row, share=(row.microseconds or 0.0) / whole) for row in rows),
        gone=gone,
        microseconds=microseconds,
        weight_bytes=weight_bytes,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pairs:
    """Ops of the file and ops of the loaded graph that are the same."""

    written: Mapping[ir.Node, ir.Node]  # by the loaded node
    kept: frozenset[ir.Node]
    loaded_values: Mapping[str, ir.Value]
    sites: frozenset[str]

    @classmethod
    def of(cls, written: ir.Graph, loaded: ir.Graph) -> _Pairs:
        """Pair nodes by name, by a name with more behind it, then by the values they write."""
        by_name = {str(node.name): node for node in written if node.name}
        by_value = {str(output.name): node for node in written for output in node.outputs}
        pairs = {node: by_name[str(node.name)] for node in loaded if node.name in by_name}
        taken = set(pairs.values())
        for node in loaded:
            if node in pairs:
                continue
            # ONNX Runtime names a fused op after one of its ops: "site/matmul/Fusion/".
            name = str(node.name).rstrip("/").rpartition("/")[0]
            found = by_name.get(name)
            if found is None or found in taken:
                found = by_value.get(str(node.outputs[0].name))
            if found is not None and found not in taken:
                pairs[node] = found
                taken.add(found)
        values = {str(output.name): output for node in loaded for output in node.outputs}
        values |= {str(value.name): value for value in loaded.initializers.values()}
        return cls(
            written=pairs,
            kept=frozenset(taken),
            loaded_values=values,
            sites=frozenset(_site(str(node.name)) for node in written),
        )


def _row(
    node: ir.Node,
    pairs: _Pairs,
    times: Mapping[str, KernelTime],
    kernels: Kernels,
    asked: Mapping[str, Precision],
) -> OpAudit:
    """The audit of one op that was loaded."""
    written = pairs.written.get(node)
    name = str(node.name)
    site = _site(name if written is None else str(written.name))
    site = site if site in pairs.sites else ""
    time = times.get(name)
    row = OpAudit(
        name=name or str(node.outputs[0].name),
        site=site,
        written="" if written is None else written.op_type,
        op=node.op_type,
        kernel=node.op_type,
        microseconds=None if time is None else time.microseconds,
        weight_bytes=sum(_bytes(value) for value in set(node.inputs) if value is not None),
        activation_bytes=0 if time is None else time.activation_bytes,
    )
    found = realise(node, kernels)
    if found is None:
        return row
    row = replace(
        row,
        kernel=found.kernel,
        computes_in=found.computes_in,
        realised=found.precision,
        hazard=found.hazard,
    )
    precision = asked.get(site)
    if precision is None:
        outcome, cause = judge_unasked(found)
    elif is_product(node) or (precision.state and found.precision.state):
        filed = None if written is None else weights_of(written)
        outcome, cause = judge(precision, found, filed)
        row = replace(row, realised=as_judged(precision, found, filed))
    else:
        return row  # a part of the site's quantization, or its bias
    if time is not None and time.op_type != node.op_type:
        outcome, cause = NOT_REALISED, f"the profile has {time.op_type} in its place"
    row = replace(row, asked=precision, outcome=outcome, cause=cause)
    if row.differs and written is not None and written.op_type != node.op_type:
        row = replace(row, cause=f"{cause}; onnxruntime made it of {written.op_type}")
    return row


def _parts(
    loaded: ir.Graph,
    pairs: _Pairs,
    kernels: Kernels,
    asked: Mapping[str, Precision],
    rows: list[OpAudit],
) -> list[OpAudit]:
    """Sites that are a part of another's product: their output is split off from what it gives."""
    judged = {row.site for row in rows if row.asked is not None}
    parts = []
    for node in loaded:
        whole = node.inputs[0] if node.op_type == "Split" else None
        maker = None if whole is None else whole.producer()
        found = None if maker is None or not is_product(maker) else realise(maker, kernels)
        if maker is None or found is None:
            continue
        written = pairs.written.get(maker)
        filed = None if written is None else weights_of(written)
        for output in node.outputs:
            site = str(output.name)
            precision = asked.get(site)
            if precision is None or site in judged:
                continue
            outcome, cause = judge(precision, found, filed)
            parts.append(
                OpAudit(
                    name=f"{site} of {maker.name}",
                    site=site,
                    written="" if written is None else written.op_type,
                    op=maker.op_type,
                    kernel=found.kernel,
                    computes_in=found.computes_in,
                    hazard=found.hazard,
                    realised=as_judged(precision, found, filed),
                    asked=precision,
                    outcome=outcome,
                    cause=cause,
                    microseconds=0.0,
                )
            )
    return parts


def _missing(
    asked: Mapping[str, Precision], rows: list[OpAudit], gone: tuple[Gone, ...]
) -> list[OpAudit]:
    """Sites that were asked for something, and have no op that could do it."""
    judged = {row.site for row in rows if row.asked is not None}
    missing = []
    for site, precision in asked.items():
        if site in judged:
            continue
        fates = [item for item in gone if _site(item.name) == site]
        left = [row.name for row in rows if row.site == site]
        if fates:
            cause = "; ".join(f"{item.op} {item.name!r} was {item.fate}" for item in fates)
        elif left:
            cause = f"no product among its ops: {', '.join(left)}"
        else:
            cause = "no op of this site is in the file"
        missing.append(
            OpAudit(name=site, site=site, asked=precision, outcome=NOT_REALISED, cause=cause)
        )
    return missing


def _unmatched(times: Mapping[str, KernelTime], loaded: ir.Graph) -> list[OpAudit]:
    """Kernels of the profile that no op of the loaded graph has the name of."""
    names = {str(node.name) for node in loaded}
    return [
        OpAudit(
            name=name,
            op=time.op_type,
            kernel=time.op_type,
            microseconds=time.microseconds,
            activation_bytes=time.activation_bytes,
            cause="only in the profile: its op lost its name at load",
        )
        for name, time in times.items()
        if name not in names
    ]


def _fate(node: ir.Node, pairs: _Pairs) -> str:
    """What became of an op: followed along what reads it, up to a value that is still there."""
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop(0)
        for output in current.outputs:
            value = pairs.loaded_values.get(str(output.name))
            if value is not None:
                maker = value.producer()
                if maker is None:
                    return "folded"
                return f"fused into {maker.op_type} {str(maker.name)!r}"
            waiting += [user for user in output.consumers() if user not in seen]
            seen.update(output.consumers())
    return "dropped"


def _bytes(value: ir.Value) -> int:
    """Bytes of a constant, none of a value that is computed."""
    return value.const_value.nbytes if value.is_initializer() and value.const_value else 0


def _site(name: str) -> str:
    return name.partition("/")[0]
