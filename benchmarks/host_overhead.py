"""Host time per token outside ONNX Runtime, through `Session.stream`: at most 0.1 ms.

What a token takes from one event to the next, less what `run_with_iobinding` takes, is the host's:
the embedding row, inputs, commit, the check for NaN, sampling, detokenizing, stop strings. It
depends on the vocabulary (49,280 in this shape), and on how cold the step leaves the caches: one
that streams 1.45 GB of weights empties them, and every call after it pays for that. Usage:

    edgevlm compile recipes/smolvlm-500m-shape.yaml -o build/smolvlm-500m-shape
    python benchmarks/host_overhead.py build/smolvlm-500m-shape
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
from paired import parser, report

from edgevlm_runtime import Bundle, Session

STOPS = ["\n\n", "never said", "###"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, stop strings": {"stop": STOPS},
    "top-k": {"temperature": 1.0, "top_k": 50, "seed": 0},
    "top-k, top-p, stop strings": {
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 0.9,
        "seed": 0,
        "stop": STOPS,
    },
    "temperature alone": {"temperature": 1.0, "seed": 0},
}


def main() -> None:
    """Measure every way of drawing, and print medians."""
    options = parser(__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("--variant")
    options.add_argument("--tokens", type=int, default=48)
    arguments = options.parse_args()
    report("host_overhead", run(arguments), arguments)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Stream answers of every mode in turns."""
    clock = EngineClock()
    session = Session(Bundle.open(arguments.bundle, arguments.variant))
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(arguments.repeats):
        for mode, settings in MODES.items():
            times[mode] += host_times(session, clock, arguments.tokens, settings)
    return {f"host_ms_per_token: {mode}": statistics.median(ms) for mode, ms in times.items()}


class EngineClock:
    """Milliseconds spent in ONNX Runtime since it was made."""

    def __init__(self) -> None:
        """Count every run of every session from now on."""
        self.total_ms = 0.0
        original = ort.InferenceSession.run_with_iobinding

        def timed(session: Any, binding: Any, run_options: Any = None) -> None:
            begun = perf_counter()
            original(session, binding, run_options)
            self.total_ms += 1000 * (perf_counter() - begun)

        ort.InferenceSession.run_with_iobinding = timed


def host_times(
    session: Session, clock: EngineClock, num_tokens: int, settings: dict[str, Any]
) -> list[float]:
    """Host milliseconds of each token; the first four are left out, they bind and warm up."""
    times = []
    grey = np.full((96, 96, 3), 96, np.uint8)
    stream = session.stream("Describe the picture.", [grey], max_new_tokens=num_tokens, **settings)
    next(stream)
    while True:
        engine, begun = clock.total_ms, perf_counter()
        event = next(stream)
        if event.completion is not None:
            return times[4:]
        times.append(1000 * (perf_counter() - begun) - (clock.total_ms - engine))


if __name__ == "__main__":
    main()
