"""What fewer visual tokens save on a full-size shape: vision, choosing, and the prompt.

For each method the vision graph and the prompt's graph are written, dense and reduced, from the
same weights, and timed in pairs: a picture of 576 visual tokens and 64 rows of text. The share of
scoring and choosing is the time of its nodes in a profile of the same graphs. Usage:

    python benchmarks/reduction_speed.py --only divprune mmtok tome fastv \
        --json devices/reports/reduction-speed.json
    python benchmarks/reduction_speed.py --int8 ...

What bounds it: products for vision and prompts (see benchmarks/limits.py); steps of a greedy choice
read their matrix from the second-level cache once each.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from paired import Timings, measure, parser, report
from reduction import CHOOSING, DENSE, INT8, TEXT_ROWS, training_free

from edgevlm.cache import file_digest
from edgevlm.checkpoint import load, open_checkpoint
from edgevlm.device import load_device
from edgevlm.errors import PassError
from edgevlm.graphs import module_of
from edgevlm.passes import Context, run_pass
from edgevlm.plan import PlannedGraph, VariantPlan, make_plan
from edgevlm.recipe import Recipe, parse_recipe
from edgevlm_export.capture import capture
from edgevlm_export.lower import lower
from edgevlm_export.targets import TARGETS
from edgevlm_export.write import WeightFile, write
from edgevlm_runtime.manifest import TensorSpec

Run = Callable[[], object]


def main() -> None:
    """Time every method against the dense graphs."""
    options = parser(__doc__)
    options.add_argument("--model", default="models/clip-l-362m-shape")
    options.add_argument("--keep", type=float, default=0.25)
    options.add_argument("--only", nargs="*", default=None)
    options.add_argument("--int8", action="store_true", help="vision and prompt in int8")
    arguments = options.parse_args()
    figures: dict[str, Any] = {"model": arguments.model, "int8": arguments.int8}
    with tempfile.TemporaryDirectory(dir="build") as folder:
        bench = Bench(arguments, Path(folder))
        dense = bench.graphs(DENSE)
        for name in arguments.only or training_free():
            try:
                ours = bench.graphs(name)
            except PassError as error:
                figures[name] = {"unreachable": error.message}
                continue
            figures[name] = bench.compared(dense, ours)
            print(name, {k: str(v) for k, v in figures[name].items()}, flush=True)
    report("reduction_speed", figures, arguments)


@dataclass(frozen=True, kw_only=True, slots=True)
class Graphs:
    """The files that a method's picture and prompt go through, with what they are fed."""

    vision: Path
    prompt: Path
    vision_feeds: Mapping[str, np.ndarray]
    prompt_feeds: Mapping[str, np.ndarray]


class Bench:
    """One model in memory, whose graphs are written with one reduction after the other."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        """Load the weights, which are drawn by their seed."""
        self.arguments, self.folder = arguments, folder
        recipe = self._recipe(DENSE)
        self.checkpoint = open_checkpoint(recipe.source, recipe.revision)
        self.spec = self.checkpoint.spec()
        self.measured: dict[tuple[str, str], tuple[Timings, float]] = {}

    def _recipe(self, method: str) -> Recipe:
        passes: list[Any] = []
        if method != DENSE:
            passes.append({"reduce": {"method": method, "keep": self.arguments.keep}})
        if self.arguments.int8:
            passes += [{"fold_norms": {}}, {"quantize": INT8}]
        data = {
            "model": self.arguments.model,
            "device": "host-cpu",
            "targets": ["ort"],
            "context": {"capacity": 1024},
            "passes": passes,
        }
        return parse_recipe(json.dumps(data), Path("recipes/reduction.yaml"))

    def graphs(self, method: str) -> Graphs:
        """Write the vision graph and the graph that reads a prompt with a picture."""
        recipe = self._recipe(method)
        device = load_device(recipe.device)
        plan = make_plan(recipe, device, self.spec)
        model = load(self.checkpoint, self.spec)
        context = Context(device=device, targets=("ort",))
        for step in recipe.passes:
            run_pass(step, model, context)
        (variant,) = plan.variants
        place = self.folder / method
        place.mkdir()
        found = {}
        for planned in wanted(variant):
            made = module_of(model, variant, planned)
            path = place / f"{planned.role}.onnx"
            # Weights of their own, so that graphs that are the same are so to the byte.
            with WeightFile(place / f"{planned.role}.bin") as weights, torch.no_grad():
                write(lower(capture(made.module, made.plan), TARGETS["ort"]), path, weights)
            tokens = model.spec.segments[0].tokens
            found[planned.role] = path, feeds_of(planned, tokens)
        (vision, pixels), (prompt, rows) = found["vision"], found["step"]
        return Graphs(vision=vision, prompt=prompt, vision_feeds=pixels, prompt_feeds=rows)

    def compared(self, dense: Graphs, ours: Graphs) -> dict[str, Any]:
        """Ratios of dense over reduced time, and the share of choosing."""
        figures: dict[str, Any] = {}
        timings: dict[str, Timings] = {}
        chosen = 0.0
        for part in ("vision", "prompt"):
            timings[part], choosing = self._part(part, dense, ours)
            chosen += choosing
            figures[f"{part}_dense_ms"] = timings[part].median(DENSE)
            figures[f"{part}_ms"] = timings[part].median("ours")
            figures[f"{part}_speedup"] = timings[part].paired(DENSE, "ours")
        both = Timings(
            ms={
                name: timings["vision"].ms[name] + timings["prompt"].ms[name]
                for name in (DENSE, "ours")
            }
        )
        figures["first_token_speedup"] = both.paired(DENSE, "ours")
        figures["choosing_ms"] = chosen
        figures["choosing_share"] = chosen / both.median("ours")
        return figures

    def _part(self, part: str, dense: Graphs, ours: Graphs) -> tuple[Timings, float]:
        """A part's times and those of its choosing; of graphs that are the same, measured once."""
        path, feeds = getattr(ours, part), getattr(ours, f"{part}_feeds")
        key = part, file_digest(path)
        if key not in self.measured:
            runs = {
                DENSE: runner(getattr(dense, part), getattr(dense, f"{part}_feeds")),
                "ours": runner(path, feeds),
            }
            arguments = self.arguments
            times = measure(runs, blocks=arguments.blocks, repeats=arguments.repeats)
            self.measured[key] = times, choosing_ms(path, feeds)
        return self.measured[key]


def wanted(variant: VariantPlan) -> list[PlannedGraph]:
    """The graph of pictures, and that of a prompt with one."""
    vision = next(graph for graph in variant.graphs if graph.role == "vision")
    steps = [graph for graph in variant.graphs if graph.role == "step"]
    for phase in ("picture", "prefill"):
        for graph in steps:
            if phase in graph.phases:
                return [vision, graph]
    raise AssertionError("some graph reads prompts")


def feeds_of(planned: PlannedGraph, tokens: int) -> dict[str, np.ndarray]:
    """What a graph is fed: one picture, and a prompt of its tokens and some text."""
    random = np.random.default_rng(0)
    rows = tokens + TEXT_ROWS
    sizes = {"N": 1, "T": rows, "R": 1, "P": 1, "Q": TEXT_ROWS}
    return {
        tensor.name: _feed(tensor, planned, sizes, tokens, random)
        for tensor in planned.signature.inputs
    }


def _feed(
    tensor: TensorSpec,
    planned: PlannedGraph,
    sizes: Mapping[str, int],
    tokens: int,
    random: np.random.Generator,
) -> np.ndarray:
    shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
    kind, _, name = tensor.source.partition(":")
    rows = sizes["T"] - planned.dropped.get(name, 0)
    numbers = {
        "last_slot": rows - 1,
        "total": rows,
        "logit_rows": sizes["T"] - 1,
        "last_row": sizes["T"] - 1,
        "picture_rows": 0,
        "state": 0,
        "question_weights": 1,
    }
    if kind in numbers:
        return np.full(shape, numbers[kind], tensor.dtype)
    if kind == "row_weights":
        return (np.arange(sizes["T"]) >= tokens).astype(np.float32)[None]
    return random.standard_normal(shape).astype(tensor.dtype)


def session_of(path: Path, *, profile: Path | None = None) -> ort.InferenceSession:
    """A session as the runtime opens it."""
    options = ort.SessionOptions()
    for name, value in TARGETS["ort"].engine.options.items():
        options.add_session_config_entry(name, value)
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def runner(path: Path, feeds: Mapping[str, np.ndarray]) -> Run:
    """Run a graph's first output."""
    session = session_of(path)
    first = [session.get_outputs()[0].name]
    return lambda: session.run(first, dict(feeds))


def choosing_ms(path: Path, feeds: Mapping[str, np.ndarray]) -> float:
    """Median time of the nodes that score and choose, of several profiled runs."""
    runs = 5
    with tempfile.TemporaryDirectory() as folder:
        session = session_of(path, profile=Path(folder) / "profile")
        for _ in range(runs + 1):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, list[float]] = {}
    for event in events:
        name = event.get("name", "")
        if name.endswith("_kernel_time") and name.startswith(CHOOSING):
            found.setdefault(name, []).append(event["dur"])
    return sum(float(np.median(times[1:])) for times in found.values()) / 1000


if __name__ == "__main__":
    main()
