"""What an audit found: a row for each op that ran, what became of the ops that did not, totals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgevlm.audit.precision import Precision
from edgevlm.errors import EvidenceError
from edgevlm_runtime import structure

__all__ = [
    "AS_ASKED",
    "COARSER",
    "FINER",
    "NOT_ASKED",
    "NOT_REALISED",
    "Gone",
    "GraphAudit",
    "OpAudit",
    "Share",
    "require_as_asked",
]

AS_ASKED, FINER, COARSER = "as asked", "finer", "coarser"
NOT_REALISED, NOT_ASKED = "not realised", "not asked"
"""Outcomes (`edgevlm.audit.judge` says when which)."""

_ROUNDS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


@dataclass(frozen=True, kw_only=True, slots=True)
class OpAudit:
    """One op of a graph as it ran.

    `written` is its op type in the file, empty where ONNX Runtime put it there; `op` is the type
    that ran, empty for a site that was asked for something and is not there. `realised` is empty
    for an op that only moves numbers. `microseconds` is the median of the runs, None where the
    profile has no kernel of that name, and 0 for a site whose product is a part of another's, which
    has the time and the weights; `share` is its part of the time of all ops.
    """

    name: str
    site: str = ""
    written: str = ""
    op: str = ""
    kernel: str = ""
    computes_in: str = ""
    asked: Precision | None = None
    realised: Precision | None = None
    outcome: str = NOT_ASKED
    cause: str = ""
    hazard: str = ""
    microseconds: float | None = None
    share: float = 0.0
    weight_bytes: int = 0
    activation_bytes: int = 0

    @property
    def differs(self) -> bool:
        """Whether something else was asked for."""
        return self.outcome not in (AS_ASKED, NOT_ASKED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gone:
    """An op of the file that did not run: ONNX Runtime `folded` or `dropped` it, or fused it."""

    name: str
    op: str
    fate: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The ops of one realised precision: how many, their time, its part of all, their weights."""

    precision: str
    count: int
    microseconds: float
    share: float
    weight_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphAudit:
    """The audit of one graph.

    `engine` is what ran it. `microseconds` is the median of whole runs, with what lies between the
    ops. `weight_bytes` counts a constant once, whoever reads it. `refused` says why the engine did
    not load or run the graph, empty where it did.
    """

    graph: str
    engine: str
    runs: int
    rows: tuple[OpAudit, ...]
    gone: tuple[Gone, ...] = ()
    microseconds: float = 0.0
    weight_bytes: int = 0
    refused: str = ""

    @property
    def differences(self) -> tuple[OpAudit, ...]:
        """Ops that are not as asked, finer ones too, in the order of the graph."""
        return tuple(row for row in self.rows if row.differs)

    @property
    def hazards(self) -> tuple[OpAudit, ...]:
        """Ops that may compute wrongly on this processor."""
        return tuple(row for row in self.rows if row.hazard)

    @property
    def inserted(self) -> tuple[OpAudit, ...]:
        """Ops that ONNX Runtime put there."""
        return tuple(row for row in self.rows if row.op and not row.written)

    @property
    def by_precision(self) -> tuple[Share, ...]:
        """What the time went to, by what was multiplied; most time first."""
        found: dict[str, list[OpAudit]] = {}
        for row in self.rows:
            if row.op:
                found.setdefault(_label(row), []).append(row)
        shares = [
            Share(
                precision=label,
                count=len(rows),
                microseconds=sum(row.microseconds or 0.0 for row in rows),
                share=sum(row.share for row in rows),
                weight_bytes=sum(row.weight_bytes for row in rows),
            )
            for label, rows in found.items()
        ]
        return tuple(sorted(shares, key=lambda share: -share.microseconds))

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest, without what is empty."""
        data: dict[str, Any] = _without_defaults(self)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any], place: str = "manifest.json") -> GraphAudit:
        """Read it back; raises BundleError for what `to_json` did not write."""
        return structure.from_json(cls, data, place)


def require_as_asked(audits: Iterable[GraphAudit]) -> None:
    """Raise EvidenceError where an op is not as asked, were it finer: what `strict: true` means."""
    for audit in audits:
        if audit.refused:
            raise EvidenceError(f"graph {audit.graph!r}: {audit.refused}", rung="audit")
        differences = audit.differences
        if differences:
            first = differences[0]
            others = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
            raise EvidenceError(
                f"graph {audit.graph!r}: {first.name!r} is {first.outcome}: {first.cause}{others}",
                rung="audit",
                site=first.site or None,
                hint="ask for what the engine does, or leave out `strict: true`",
            )


def _label(row: OpAudit) -> str:
    if row.realised is None:
        return "rounding" if row.op in _ROUNDS else "moving"
    weights, activations = row.realised.weights, row.realised.activations
    product = " x ".join(part for part in (weights, activations) if part)
    if row.realised.emulated:
        return f"{product}, emulated"
    return product if row.computes_in in ("", activations) else f"{product} in {row.computes_in}"


def _without_defaults(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            field.name: _without_defaults(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != field.default
        }
    if isinstance(value, tuple):
        return [_without_defaults(item) for item in value]
    return value
