"""The audit of an embedding table: no graph, but rows that are looked up in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgevlm.audit.judge import judge, judge_unasked
from edgevlm.audit.precision import Precision
from edgevlm.audit.report import GraphAudit, OpAudit
from edgevlm.audit.rules import Realised
from edgevlm.audit.trace import scales_of_blocks
from edgevlm.audit.weights import Weights
from edgevlm_runtime.manifest import GraphSpec

__all__ = ["audit_table"]


def audit_table(folder: Path, graph: GraphSpec, asked: Mapping[str, Precision]) -> GraphAudit:
    """Audit the table in a bundle's folder; it is asked for by the name of its graph."""
    table = np.load(folder / graph.file, mmap_mode="r", allow_pickle=False)
    weights = Weights(dtype=table.dtype.name, granularity="", columns=table.shape[-1])
    size = table.nbytes
    if "bits" in graph.engine.options:
        bits, block = (int(graph.engine.options[name]) for name in ("bits", "block_size"))
        scales = np.load(folder / graph.weights[0], mmap_mode="r", allow_pickle=False)
        weights = Weights(
            dtype=f"int{bits}",
            granularity=scales_of_blocks(scales, block),
            columns=block * scales.shape[1],
        )
        size += scales.nbytes
    found = Realised(
        precision=Precision(weights=weights.dtype, weight_granularity=weights.granularity),
        kernel="table",
        weights=weights,
    )
    precision = asked.get(graph.name)
    outcome, cause = judge_unasked(found)
    if precision is not None:
        outcome, cause = judge(precision, found, weights)
    row = OpAudit(
        name=graph.name,
        site=graph.name,
        written="table",
        op="table",
        kernel=found.kernel,
        asked=precision,
        realised=found.precision,
        outcome=outcome,
        cause=cause,
        weight_bytes=size,
    )
    return GraphAudit(
        graph=graph.name, engine=graph.engine.kind, runs=0, rows=(row,), weight_bytes=size
    )
