"""Wall time and peak resident memory of one whole `edgevlm compile`, from an empty cache.

What bounds it: writing and hashing the weights (0.5 to 1.4 GB/s), one export of every graph, and
the evidence, which runs the model three times more. Usage:

    python benchmarks/compile_cost.py recipes/smolvlm-500m-shape.yaml --target ort
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from paired import parser, report


def main() -> None:
    """Compile once and print what it cost."""
    options = parser(__doc__)
    options.add_argument("recipe", type=Path)
    options.add_argument("--target", help="compile this target alone")
    arguments = options.parse_args()
    report("compile_cost", run(arguments), arguments)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Compile in a child with a home of its own, so that its cache is empty."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        recipe = arguments.recipe
        if arguments.target:
            lines = [
                line for line in recipe.read_text().splitlines() if not line.startswith("targets:")
            ]
            recipe = recipe.with_name(f".{recipe.stem}-{arguments.target}.yaml")
            recipe.write_text("\n".join([*lines, f"targets: [{arguments.target}]"]) + "\n")
        try:
            started = time.monotonic()
            command = [sys.executable, "-m", "edgevlm", "compile", str(recipe)]
            done = subprocess.run(
                [*command, "--json", "--out", f"{folder}/bundle"],
                env={**os.environ, "HOME": folder},
                stdout=subprocess.PIPE,
                check=True,
            )
            seconds = time.monotonic() - started
        finally:
            if arguments.target:
                recipe.unlink()
        json.loads(done.stdout)
        manifest = json.loads(Path(folder, "bundle", "manifest.json").read_text())
        # The head is the embedding, which is a file of its own.
        weights = sum(manifest["files"][name]["size"] for name in ("weights.bin", "embedding.npy"))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return {
            "seconds": round(seconds, 1),
            "peak_resident_bytes": peak,
            "float32_weights_bytes": weights,
            "peak_over_weights": round(peak / weights, 3),
        }


if __name__ == "__main__":
    main()
