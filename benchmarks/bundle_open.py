"""Opening a bundle, every hash checked, against bare sessions of the same files.

What bounds it: sha256 runs at 1.4 GB/s on one core, and a session packs its weights at about
0.5 GB/s, so hashing in other threads while nothing is parsed yet costs the smaller part. Usage:

    python benchmarks/bundle_open.py build/smolvlm-500m-shape
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime as ort
from paired import measure, parser, report

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.session import Session


def main() -> None:
    """Measure both, and print the ratio."""
    options = parser(__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("--variant", default="ort")
    arguments = options.parse_args()
    report("bundle_open", run(arguments), arguments)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Open the bundle, and the graphs that it opens, in alternating blocks."""
    variant = Bundle.open(arguments.bundle, arguments.variant).variant
    graphs = [graph for graph in variant.graphs if graph.role in ("vision", "step")]

    def bare() -> None:
        for graph in graphs:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            for name, value in graph.engine.options.items():
                options.add_session_config_entry(name, value)
            ort.InferenceSession(
                arguments.bundle / graph.file, options, providers=["CPUExecutionProvider"]
            )

    def ours() -> None:
        Session(Bundle.open(arguments.bundle, arguments.variant))

    timings = measure({"ours": ours, "bare": bare}, blocks=max(4, arguments.blocks // 3), repeats=2)
    return {
        "bytes": sum(path.stat().st_size for path in arguments.bundle.iterdir()),
        "ours_ms": timings.median("ours"),
        "bare_ms": timings.median("bare"),
        "ratio": timings.ratio("ours", "bare"),
    }


if __name__ == "__main__":
    main()
