"""Five sites, each in one scheme, and what an audit of them says."""

from __future__ import annotations

from pathlib import Path

from edgevlm.audit.audit import audit_graph
from edgevlm.audit.precision import Precision
from edgevlm.audit.report import GraphAudit
from edgevlm_runtime.manifest import GraphSpec
from tests.edgevlm.audit.written import Written, feeds, graph_spec

W4A16 = Precision(weights="int4", weight_granularity="group:32", activations="float32")
W4A8 = Precision(
    weights="int4",
    weight_granularity="group:32",
    activations="int8",
    activation_granularity="group:32",
    dynamic=True,
)
STATIC = Precision(
    weights="int8",
    weight_granularity="channel",
    activations="int8",
    activation_granularity="tensor",
)
TOKEN = Precision(
    weights="int8",
    weight_granularity="channel",
    activations="int8",
    activation_granularity="token",
    dynamic=True,
)
DYNAMIC = Precision(
    weights="int8",
    weight_granularity="channel",
    activations="int8",
    activation_granularity="tensor",
    dynamic=True,
)
FLOAT8 = Precision(
    weights="float8_e4m3fn",
    weight_granularity="channel",
    activations="float8_e4m3fn",
    activation_granularity="tensor",
)
ASKED = {"a": W4A16, "b": W4A8, "c": STATIC, "d": TOKEN, "e": DYNAMIC}

Difference = tuple[str, str, str]


def honest_file(folder: Path) -> Path:
    """Five sites, whose 7-bit weights never saturate, and a float one."""
    written = Written().nbits("a").nbits("b", level=4).qdq("c", most=63)
    return written.token("d", most=63).dynamic("e", most=63).floats("f").write(folder)


def audited(
    path: Path, spec: GraphSpec | None = None, asked: dict[str, Precision] | None = None
) -> GraphAudit:
    """The audit of a file, asked for what the honest one has."""
    return audit_graph(path, spec or graph_spec(), feeds(), ASKED if asked is None else asked)


def differences(audit: GraphAudit) -> list[Difference]:
    """Name, outcome and cause of all differences."""
    return [(row.name, row.outcome, row.cause) for row in audit.differences]
