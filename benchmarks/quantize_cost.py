"""Time and resident memory of the passes of a compile, apart from its evidence and graphs.

A compile runs in a child with an empty cache; its memory is looked at four times a second while its
log says which stage it is in. Usage:

    python benchmarks/quantize_cost.py recipes/smolvlm-500m-w4.yaml --out build/smolvlm-500m-w4
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from paired import parser, report

INTERVAL_S = 0.25
PASSES = ("passes", "awq", "smooth", "rotate", "quantize")
_DONE = re.compile(r"^(?P<stage>[^:]+(: [^:]+)?): done in (?P<seconds>[\d.]+) s$")


def main() -> None:
    """Compile once, and print what its passes cost."""
    options = parser(__doc__)
    options.add_argument("recipe", type=Path)
    options.add_argument("--out", type=Path, required=True, help="where the bundle goes")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        log = Path(folder, "log")
        command = [sys.executable, "-m", "edgevlm", "compile", str(arguments.recipe)]
        with log.open("w") as lines:
            child = subprocess.Popen(
                [*command, "--out", str(arguments.out)],
                env={**os.environ, "HOME": folder},
                stdout=subprocess.DEVNULL,
                stderr=lines,
            )
        started, peaks = time.monotonic(), dict[str, int]()
        while child.poll() is None:
            stage = stage_of(log.read_text().splitlines())
            peaks[stage] = max(peaks.get(stage, 0), resident_bytes(child.pid))
            time.sleep(INTERVAL_S)
        if child.returncode:
            raise SystemExit(log.read_text())
        seconds = {
            found["stage"]: float(found["seconds"])
            for found in map(_DONE.match, log.read_text().splitlines())
            if found is not None and found["stage"] in PASSES
        }
    manifest = arguments.out / "manifest.json"
    print(f"{manifest} was written")
    report(
        "quantize_cost",
        {
            "recipe": arguments.recipe.name,
            "compile_seconds": round(time.monotonic() - started, 1),
            "pass_seconds": seconds,
            "peak_bytes_of_passes": max(peaks.get(stage, 0) for stage in PASSES),
            "peak_bytes_by_stage": peaks,
        },
        arguments,
    )


def stage_of(lines: list[str]) -> str:
    """The stage that the last line of a log is about."""
    words = lines[-1].split(": ") if lines else [""]
    return ": ".join(words[:-1])


def resident_bytes(process: int) -> int:
    """Resident memory of a process, 0 where it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return 1024 * int(found.group(1)) if found else 0


if __name__ == "__main__":
    main()
