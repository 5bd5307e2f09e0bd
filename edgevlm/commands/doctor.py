"""`edgevlm doctor`: what the doctor found, as tables or as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from edgevlm.commands.output import console, marked, print_json, table
from edgevlm.doctor import Examination, Machine, examine

GIB = 2**30


def doctor_command(*, as_json: bool) -> None:
    """Examine this machine and show what was found."""
    found = examine()
    if as_json:
        print_json(doctor_document(found))
    else:
        _show(found, console())


def doctor_document(found: Examination) -> dict[str, Any]:
    """What was found as JSON has it (`schemas/doctor.schema.json`)."""
    return {
        "machine": found.machine,
        "packages": [
            {
                "name": package.name,
                "extra": package.extra,
                "installed": package.installed,
                "tested": package.tested,
                "status": package.status,
            }
            for package in found.packages
        ],
        "trials": found.trials,
        "advice": found.advice,
    }


def _show(found: Examination, out: Console) -> None:
    _show_machine(found.machine, out)
    out.print()
    packages = table("packages", "package", "installed", "tested", "status", "part of")
    for package in found.packages:
        packages.add_row(
            package.name,
            package.installed or "",
            package.tested or "",
            marked(package.status),
            package.extra or "edgevlm",
        )
    out.print(packages)
    out.print()
    trials = table("tried here", "what", "works", "how")
    for trial in found.trials:
        trials.add_row(trial.name, marked("yes" if trial.works else "no"), trial.detail)
    out.print(trials)
    out.print()
    if not found.advice:
        out.print("nothing is missing")
    for line in found.advice:
        out.print(line)


def _show_machine(machine: Machine, out: Console) -> None:
    lines = {
        "system": f"{machine.system}, Python {machine.python}",
        "cpu": f"{machine.cpu}, {machine.cores} cores usable",
        "features": " ".join(machine.features) or "none that are known here",
        "memory": f"{machine.memory_bytes / GIB:.1f} GiB, "
        f"{machine.available_bytes / GIB:.1f} GiB available",
        "cache": f"{machine.cache}, {machine.cache_free_bytes / GIB:.1f} GiB free",
    }
    for name, text in lines.items():
        out.print(f"{name:<9} {text}")
