"""Timing of things side by side: alternating blocks, the first repeat of each block thrown away.

The speed of a shared machine drifts by a factor of two, so a single absolute time says nothing.
What is quoted is the ratio of medians with a 95 % interval from a bootstrap over blocks: blocks,
not repeats, because repeats within a block share the same moment.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSIONS_OF = ("numpy", "onnx", "onnxruntime", "torch", "transformers", "edgevlm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A ratio of medians and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Format as `0.98 [0.96, 1.01]`."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Milliseconds of every candidate, as [blocks, repeats]."""

    ms: Mapping[str, NDArray[np.float64]]

    def median(self, name: str) -> float:
        """Median milliseconds of a candidate."""
        return float(np.median(self.ms[name]))

    def ratio(self, name: str, against: str, *, resamples: int = 2000) -> Ratio:
        """Return the median of `name` over the median of `against`."""
        ours, theirs = self.ms[name], self.ms[against]
        random = np.random.default_rng(0)
        picks = random.integers(0, len(ours), (resamples, len(ours)))
        ratios = [np.median(ours[pick]) / np.median(theirs[pick]) for pick in picks]
        low, high = np.percentile(ratios, [2.5, 97.5])
        return Ratio(
            value=float(np.median(ours) / np.median(theirs)), low=float(low), high=float(high)
        )

    def paired(self, name: str, against: str, *, resamples: int = 2000) -> Ratio:
        """The median over blocks of what a block's median is to the other's in the same block.

        Both were timed within seconds of each other, so a machine that drifts from block to block
        moves this less than a ratio of medians over all blocks.
        """
        ours, theirs = (np.median(self.ms[each], axis=1) for each in (name, against))
        ratios = ours / theirs
        random = np.random.default_rng(0)
        picks = random.integers(0, len(ratios), (resamples, len(ratios)))
        low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
        return Ratio(value=float(np.median(ratios)), low=float(low), high=float(high))


def measure(
    candidates: Mapping[str, Callable[[], object]], *, blocks: int = 12, repeats: int = 5
) -> Timings:
    """Time candidates in alternating blocks; each block's first call is thrown away.

    The order turns round from block to block, so that no candidate always runs behind the same one.
    """
    ms: dict[str, list[list[float]]] = {name: [] for name in candidates}
    for block in range(blocks):
        names = list(candidates) if block % 2 == 0 else list(reversed(candidates))
        for name in names:
            run = candidates[name]
            run()
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - start))
            ms[name].append(times)
    return Timings(ms={name: np.array(rows) for name, rows in ms.items()})


def report(name: str, figures: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """Print the figures, and write them with date, machine and versions where --json asks."""
    document = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": {
            "processor": _processor(),
            "cores": _cores(),
            "python": platform.python_version(),
        },
        "versions": {package: _version(package) for package in VERSIONS_OF},
        "figures": figures,
    }
    for key, value in figures.items():
        print(f"{key:44} {value}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=2, default=_plain) + "\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options all benchmarks share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, help="write the figures to this file")
    made.add_argument("--blocks", type=int, default=12, help="alternating blocks per candidate")
    made.add_argument("--repeats", type=int, default=5, help="timed calls per block")
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, Ratio):
        return {"value": value.value, "low": value.low, "high": value.high}
    raise TypeError(f"cannot write a {type(value).__name__}")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
