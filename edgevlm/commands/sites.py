"""What quantization cost, as tables: by component and task, by site, and what float would save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from edgevlm.audit.report import GraphAudit
from edgevlm.commands.output import mebibytes, table

__all__ = ["show_audit_lines", "show_losses", "show_sites"]

MOST_SITES = 12


def show_losses(evidence: Mapping[str, Any], out: Console) -> None:
    """Print what each lossy form lost against the form before it, by component and by task."""
    rungs = {rung["name"]: rung for rung in evidence["rungs"]}
    lossy = [rung for rung in rungs.values() if rung["kind"] == "quantized"]
    if not lossy:
        return
    losses = table(
        "lost", "form", "against", "vision SQNR", "vision RMS", "proj. SQNR", "logits KL", "argmax"
    )
    for rung in lossy:
        vision, decoder = rung["vision"], rung["decoder"]
        losses.add_row(
            rung["name"],
            rung["parent"],
            _decibels(vision),
            "" if vision is None else f"{10 ** (-vision['sqnr_db'] / 20):.2%}",
            _decibels(rung["projector"]),
            "" if decoder is None else f"{decoder['kl']:.1e}",
            "" if decoder is None else f"{decoder['argmax']:.1%}",
        )
    out.print()
    out.print(losses)
    out.print(
        "logits: of the decoder alone, which is shown the pictures as the form before saw them"
    )
    before, after = rungs[lossy[0]["parent"]], lossy[-1]
    if after["accuracy"].get("tasks"):
        _show_tasks(before, after, out)


def _show_tasks(before: Mapping[str, Any], after: Mapping[str, Any], out: Console) -> None:
    title = f"accuracy on {sum(task['n'] for task in after['accuracy']['tasks'].values())} samples"
    tasks = table(title, "task", before["name"], after["name"], "95 % interval", "n")
    for name, task in after["accuracy"]["tasks"].items():
        tasks.add_row(
            name,
            f"{before['accuracy']['tasks'][name]['accuracy']:.1%}",
            f"{task['accuracy']:.1%}",
            f"{task['low']:.1%} to {task['high']:.1%}",
            str(task["n"]),
        )
    out.print(tasks)


def show_sites(sites: Mapping[str, Any] | None, out: Console) -> None:
    """Print the sites that do most harm, or have most noise, and what float would save."""
    if not sites:
        return
    noise = {row["site"]: row for row in sites["noise"]}
    harm = {row["site"]: row for row in sites["harm"]}
    order = list(harm) or sorted(noise, key=lambda site: float(noise[site]["sqnr_db"]))
    what = "harm" if harm else "noise"
    shown = table(
        f"sites by {what} ({min(MOST_SITES, len(order))} of {len(order)})",
        *("site", "scheme", "own SQNR", "SQNR there", "RMS", "KL alone", "as float"),
    )
    for site in order[:MOST_SITES]:
        row = noise[site]
        alone = harm.get(site)
        shown.add_row(
            site,
            row["scheme"],
            f"{row['own_db']:.1f} dB",
            f"{row['sqnr_db']:.1f} dB",
            f"{row['rms']:.2%}",
            "" if alone is None else f"{alone['kl']:.1e}",
            "" if alone is None else f"+{mebibytes(alone['extra_bytes'])}",
        )
    out.print()
    out.print(shown)
    if not sites["what_if"]:
        return
    trials = table("what if the worst were float", "sites", "logits KL", "argmax", "score", "bytes")
    for trial in sites["what_if"]:
        accuracy = trial["accuracy"]
        trials.add_row(
            str(len(trial["sites"])),
            f"{trial['kl']:.1e}",
            f"{trial['argmax']:.1%}",
            "" if accuracy is None else f"{accuracy:.1%}",
            f"+{mebibytes(trial['extra_bytes'])}",
        )
    out.print(trials)
    out.print("logits: of the whole model, with its own pictures")


def show_audit_lines(audits: Mapping[str, Sequence[GraphAudit]], out: Console) -> None:
    """Print a line for each graph, and every op that is not as asked."""
    if not any(audits.values()):
        return
    lines = table("audit", "graph", "asked", "as asked", "not as asked", "hazards", "weights")
    for variant, several in audits.items():
        for audit in several:
            asked = [row for row in audit.rows if row.asked is not None]
            lines.add_row(
                f"{variant}.{audit.graph}",
                str(len(asked)),
                str(len(asked) - len(audit.differences)),
                str(len(audit.differences)) + (" (refused)" if audit.refused else ""),
                str(len(audit.hazards)),
                mebibytes(audit.weight_bytes),
            )
    out.print()
    out.print(lines)
    for several in audits.values():
        for audit in several:
            for row in audit.differences:
                out.print(f"{audit.graph}: {row.name} is {row.outcome}: {row.cause}")


def _decibels(agreement: Mapping[str, float] | None) -> str:
    return "" if agreement is None else f"{agreement['sqnr_db']:.1f} dB"
