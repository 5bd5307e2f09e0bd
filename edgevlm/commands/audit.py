"""The audit of a bundle, as JSON and as tables: for `inspect --audit` and `compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console

from edgevlm.audit.report import GraphAudit, OpAudit
from edgevlm.commands.output import mebibytes, table

__all__ = ["audit_document", "audits_of", "show_audits"]

MOST_ROWS = 12

T = TypeVar("T")
K = TypeVar("K")


def audits_of(provenance: Mapping[str, Any]) -> dict[str, tuple[GraphAudit, ...]]:
    """The audits that a compile wrote down, by variant; empty where it audited nothing."""
    return {
        variant: tuple(
            GraphAudit.from_json(data, f"manifest.json: provenance.audit.{variant}[{index}]")
            for index, data in enumerate(audits)
        )
        for variant, audits in provenance.get("audit", {}).items()
    }


def audit_document(audits: Mapping[str, Sequence[GraphAudit]]) -> dict[str, Any]:
    """Audits by variant as JSON has them, with the sums that the tables show."""
    return {
        variant: [
            {
                **audit.to_json(),
                "differences": len(audit.differences),
                "hazards": len(audit.hazards),
                "by_precision": audit.by_precision,
            }
            for audit in several
        ]
        for variant, several in audits.items()
    }


def show_audits(audits: Mapping[str, Sequence[GraphAudit]], out: Console) -> None:
    """Print for each graph what its time went to, and every op that is not as asked."""
    for variant, several in audits.items():
        for audit in several:
            out.print()
            _show_graph(f"{variant}.{audit.graph}", audit, out)
    if not any(audits.values()):
        out.print("no audit: the ops of this bundle were not looked at")


def _show_graph(name: str, audit: GraphAudit, out: Console) -> None:
    if audit.refused:
        out.print(f"audit of {name}: {audit.refused}", style="bold red")
        return
    asked = sum(row.asked is not None for row in audit.rows)
    out.print(
        f"audit of {name} ({audit.engine}): {_ops(audit.rows)}, {asked} asked for a precision, "
        f"{len(audit.differences)} not as asked",
        style="bold red" if audit.differences else "bold",
    )
    _show_kernels(audit, out)
    if audit.differences:
        found = table(None, "op", "asked", "realised", "outcome", "cause")
        for row in audit.differences:
            found.add_row(row.name, _text(row.asked), _text(row.realised), row.outcome, row.cause)
        out.print(found)
    for hazard, rows in _grouped(audit.hazards, lambda row: row.hazard.partition(":")[0]):
        out.print(f"{hazard}, {_ops(rows)}:", style="yellow")
        for row in rows[:MOST_ROWS]:
            out.print(f"  {row.name}: {row.hazard.partition(': ')[2]}", style="yellow")
        if len(rows) > MOST_ROWS:
            out.print(f"  and {len(rows) - MOST_ROWS} more", style="yellow")
    for fate, gone in _grouped(audit.gone, lambda op: op.fate.partition(" ")[0]):
        out.print(f"{_ops(gone)} of the file {fate} at load", style="dim")
    if audit.inserted:
        out.print(f"{_ops(audit.inserted)} inserted at load", style="dim")


def _show_kernels(audit: GraphAudit, out: Console) -> None:
    """What the time went to, most first; what is not shown is in the last line."""
    groups = _grouped(audit.rows, lambda row: (row.kernel, _text(row.realised)))
    timed = [(key, rows, sum(row.microseconds or 0.0 for row in rows)) for key, rows in groups]
    timed.sort(key=lambda entry: -entry[2])
    kernels = table(None, "kernel", "weights x activations", "ops", "ms", "time", "weights")
    for (kernel, precision), rows, microseconds in timed[:MOST_ROWS]:
        kernels.add_row(*_figures(kernel, precision, rows, microseconds))
    left = [row for _, rows, _ in timed[MOST_ROWS:] for row in rows]
    if left:
        rest = sum(row.microseconds or 0.0 for row in left)
        kernels.add_row(*_figures(f"{len(timed) - MOST_ROWS} more", "", left, rest))
    if audit.microseconds:
        between = audit.microseconds - sum(microseconds for _, _, microseconds in timed)
        whole = mebibytes(audit.weight_bytes)
        kernels.add_row("between ops", "", "", f"{max(between, 0.0) / 1e3:.2f}", "", "")
        kernels.add_row("a run", "", "", f"{audit.microseconds / 1e3:.2f}", "", whole)
    out.print(kernels)


def _figures(
    kernel: str, precision: str, rows: Sequence[OpAudit], microseconds: float
) -> tuple[str, ...]:
    return (
        kernel,
        precision,
        str(len(rows)),
        f"{microseconds / 1e3:.2f}",
        f"{sum(row.share for row in rows):.1%}",
        mebibytes(sum(row.weight_bytes for row in rows)),
    )


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> list[tuple[K, list[T]]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def _ops(items: Sequence[object]) -> str:
    return "1 op" if len(items) == 1 else f"{len(items)} ops"


def _text(value: object) -> str:
    return "" if value is None else str(value)
