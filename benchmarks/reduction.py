"""Every reduction method at every budget: accuracy by task, operations, and time to a first token.

A budget is the average of visual tokens over the decoder's layers, as a share of all: methods that
cut late and methods that cut early stand side by side at the same average, `random` and `uniform`
among them; methods that learn stand aside, since nothing here has trained them. What a schedule
cannot reach is printed with the least that it can. Usage:

    python benchmarks/reduction.py --quick
    python benchmarks/reduction.py --questions 720
    python benchmarks/reduction.py --questions 720 --times \
        --json devices/reports/reduction.json --plot devices/reports/reduction.svg

`--quick` asks our torch model 180 questions at 25 %. Without it every method is compiled for ONNX
Runtime at every budget and the bundles are asked; what is done is kept in --work, and a second run
goes on from there. `--times` adds the time to a first token of every bundle, side by side with the
dense one: for it the machine must have nothing else to do.

What bounds it: at this size of model the products of the encoder, which only merging in its layers
makes fewer, and the calls of a few hundred small nodes.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import Timings, parser, report

from edgevlm.cache import StageCache, code_version, default_root, digest
from edgevlm.checkpoint import load, open_checkpoint
from edgevlm.compile import compile_recipe
from edgevlm.errors import PassError
from edgevlm.evidence.fed import asking_of, inputs_along, pixels_of, visual_of
from edgevlm.evidence.witness import ask
from edgevlm.families.text_spec import tokenizer_json
from edgevlm.model.vlm import Vlm
from edgevlm.plan import recipe_plan
from edgevlm.progress import Silent
from edgevlm.recipe import Recipe, parse_recipe
from edgevlm.reduce.catalogue import load_method, method_names
from edgevlm.reduce.cost import Prompt, prompt_cost
from edgevlm.reduce.plan import average_tokens
from edgevlm.samples import Sample, draw_samples, score_answers
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.engines import ort as engine
from edgevlm_runtime.image import ImageSpec
from edgevlm_runtime.session import Session
from edgevlm_runtime.text import TextSpec, load_tokenizer

PLACE = Path("recipes/reduction.yaml")
BUDGETS = (0.5, 0.25, 0.11, 0.056)
BLOCKS, REPEATS = 12, 5
QUICK_BUDGET, QUICK_QUESTIONS = 0.25, 180
DENSE = "dense"
TEXT_ROWS = 64
"""Rows of text of the prompt whose operations are counted."""
CHOOSING = ("vision.reduce.", "reduce.", "decoder.cuts.", "vision.merges.")
"""What the names of nodes that score, choose and move tokens begin with."""
INT8: dict[str, Any] = {
    "vision": "w8a8",
    "projector": "w8a8",
    "prefill": "w8a8",
    "decoder": "w4a16",
    "head": "w8a16",
}
COMBINED = ("uniform", "divprune", "visionzip", "tome", "feather")
"""Methods that are measured with quantization too."""


def main() -> None:
    """Measure every method, and print the table."""
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="25 %%, our torch model")
    options.add_argument("--questions", type=int, default=None)
    options.add_argument("--only", nargs="*", default=None, help="these methods")
    options.add_argument("--work", type=Path, default=Path("build/reduction"))
    options.add_argument("--times", action="store_true", help="time the bundles, undisturbed")
    options.add_argument("--plot", type=Path, help="write a picture of accuracy and operations")
    arguments = options.parse_args()
    names = arguments.only or [DENSE, *training_free()]
    if arguments.quick:
        rows = list(quick(names, arguments.questions or QUICK_QUESTIONS))
    else:
        cells = Cells(arguments.work, arguments.questions or 720)
        rows = list(cells.rows(names, is_timed=arguments.times))
    if arguments.plot is not None:
        from plots import pareto

        pareto(rows, arguments.plot)
    report("reduction", {"quick": arguments.quick, "rows": rows}, arguments)


def training_free() -> list[str]:
    """The methods that mean something without weights of their own."""
    return [name for name in method_names() if not load_method(name).learns]


def recipe_of(method: str, budget: float, *, is_quantized: bool = False) -> Recipe:
    """The recipe of a method at a budget, for ONNX Runtime, with little evidence of its own."""
    passes: list[Any] = []
    if method != DENSE:
        passes.append({"reduce": {"method": method, "keep": budget}})
    if is_quantized:
        passes += [{"fold_norms": {}}, {"quantize": INT8}]
    data = {
        "model": "models/scenes-vlm",
        "device": "host-cpu",
        "targets": ["ort"],
        "passes": passes,
        "evidence": {"samples": 9, "reduced": {"accuracy_drop": 1.0}},
    }
    # JSON is YAML, and a recipe is what a user writes.
    return parse_recipe(json.dumps(data), PLACE)


def figures_of(recipe: Recipe) -> dict[str, Any]:
    """What the plan says of a recipe: tokens, and what they cost beside the dense model."""
    plan = recipe_plan(recipe)
    before = plan.spec if plan.spec.reduction is None else recipe_plan(recipe_of(DENSE, 1.0)).spec
    dense, ours = (
        prompt_cost(spec, Prompt(grid=spec.vision.grids[0], text_rows=TEXT_ROWS))
        for spec in (before, plan.spec)
    )
    average = average_tokens(plan.spec.segments)
    return {
        "tokens": average,
        "share": average / before.dense_tokens(before.vision.grids[0]),
        "macs": ours.total,
        "macs_share": ours.total / dense.total,
        "prefill_macs_share": ours.prefill / dense.prefill,
        "kv_share": ours.kv_numbers / dense.kv_numbers,
    }


def quick(names: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
    """Ask our torch model, with each method in turn."""
    bench = Eager(count)
    for name in names:
        yield from shown(bench.row(name, QUICK_BUDGET))


def shown(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Print a row, and give it on."""
    print(line(row), flush=True)
    yield row


def line(row: Mapping[str, Any]) -> str:
    """One row of the table."""
    name = f"{row['method']} {'int8 ' if row.get('int8') else ''}{100 * row['budget']:g} %"
    if "unreachable" in row:
        return f"{name:32} {row['unreachable']}"
    tasks = "  ".join(f"{task} {100 * value:3.0f}" for task, value in row["tasks"].items())
    times = f"{row['first_token_ms']:6.1f} ms" if "first_token_ms" in row else ""
    return f"{name:32} {100 * row['mean']:5.1f}  {row['tokens']:6.1f} tokens  {times}  {tasks}"


def scored(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """Mean accuracy and that of every task."""
    found = score_answers(samples, answers)
    tasks = {name: task["accuracy"] for name, task in found["tasks"].items()}
    intervals = {name: [task["low"], task["high"]] for name, task in found["tasks"].items()}
    return {"mean": found["mean_accuracy"], "tasks": tasks, "intervals": intervals}


class Eager:
    """Our torch model, which takes one reduction after the other."""

    def __init__(self, count: int) -> None:
        """Load the model and draw the questions."""
        recipe = recipe_of(DENSE, 1.0)
        checkpoint = open_checkpoint(recipe.source, recipe.revision)
        self.spec = recipe_plan(recipe).spec
        self.model: Vlm = load(checkpoint, self.spec)
        text = TextSpec.from_json(self.spec.text)
        self.tokenizer = load_tokenizer(tokenizer_json(checkpoint.folder, text))
        self.samples = draw_samples(None, split="evaluation", count=count, seed=0)

    def row(self, method: str, budget: float) -> dict[str, Any]:
        """A method's figures at a budget."""
        begin: dict[str, Any] = {"method": method, "budget": budget if method != DENSE else 1.0}
        try:
            plan = recipe_plan(recipe_of(method, budget))
        except PassError as error:
            return begin | {"unreachable": error.message}
        self.model.stage(plan.spec)
        with torch.inference_mode():
            answers = [self._answer(sample) for sample in self.samples]
        return begin | figures_of(plan.recipe) | scored(self.samples, answers)

    def _answer(self, sample: Sample) -> str:
        model = self.model
        image, text = ImageSpec.from_json(model.spec.image), TextSpec.from_json(model.spec.text)
        question = ask(sample, image, text, self.tokenizer)
        asking = asking_of(model, question)
        calls = []
        for picture in question.images:
            grid = picture.layout.grid or model.spec.vision.grids[0]
            for feed in picture.feeds:
                calls.append((model.visual(pixels_of(feed), grid, asking), grid))
        fed = inputs_along(model, question, visual_of(model, calls), ())
        tokens: list[int] = []
        ends = model.spec.generation.eos_token_ids
        for token, _ in islice(model.greedy(fed.rows, fed.positions, fed.pictures), 64):
            if token in ends:
                break
            tokens.append(token)
        return str(self.tokenizer.decode(tokens))


class Cells:
    """Bundles and rows of the table, kept in a folder from one run to the next."""

    def __init__(self, work: Path, count: int) -> None:
        """Draw the questions."""
        self.work = work
        self.samples = draw_samples(None, split="evaluation", count=count, seed=0)
        self.key = code_version()

    def rows(self, names: Sequence[str], *, is_timed: bool) -> Iterator[dict[str, Any]]:
        """Compile every method at every budget and ask the bundles; then time them."""
        asked = [(name, budget, False) for budget in BUDGETS for name in names if name != DENSE]
        asked += [(name, 0.25, True) for name in COMBINED if name in names]
        asked = [(DENSE, 1.0, False), (DENSE, 1.0, True), *asked]
        rows = [row for row in self._each(asked, self._measured) for row in shown(row)]
        if not is_timed:
            return iter(rows)
        print("side by side with the dense bundle:")
        return (row for row in self._each(asked, self._timed) for row in shown(row))

    def _each(
        self, asked: Sequence[tuple[str, float, bool]], work: Callable[..., dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """What `work` adds to the row of every cell, unless it has done so before."""
        begun, done = time.monotonic(), 0
        part = work.__name__
        for place, (name, budget, is_quantized) in enumerate(asked, 1):
            cell = f"{name}-{budget:g}{'-int8' if is_quantized else ''}"
            recipe = recipe_of(name, budget, is_quantized=is_quantized)
            key, path = digest(self.key, recipe, len(self.samples)), self.work / f"{cell}.json"
            kept = json.loads(path.read_text()) if path.exists() else {}
            if kept.get("key") != key:
                kept = {"key": key, "row": {"method": name, "budget": budget, "int8": is_quantized}}
            if part not in kept:
                kept["row"] |= work(recipe, self.work / "bundles" / cell, kept["row"])
                kept[part] = True
                self.work.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(kept, indent=1))
                done += 1
                left = (time.monotonic() - begun) / done * (len(asked) - place)
                print(f"{place} of {len(asked)}, about {left / 60:.0f} min left", file=sys.stderr)
            yield kept["row"]

    def _measured(self, recipe: Recipe, bundle: Path, row: Mapping[str, Any]) -> dict[str, Any]:
        """Compile a recipe, and ask the bundle."""
        shutil.rmtree(bundle, ignore_errors=True)
        bundle.parent.mkdir(parents=True, exist_ok=True)
        try:
            figures = figures_of(recipe)
            compile_recipe(recipe, bundle, cache=StageCache(root=default_root()), progress=Silent())
        except PassError as error:
            return {"unreachable": error.message}
        session = Session(Bundle.open(bundle, "ort"))
        answers = [
            session.generate(
                sample.messages, sample.images, max_new_tokens=64, temperature=0.0
            ).text
            for sample in self.samples
        ]
        return figures | scored(self.samples, answers)

    def _timed(self, recipe: Recipe, bundle: Path, row: Mapping[str, Any]) -> dict[str, Any]:
        """Time a bundle and the dense one by turns, with questions about one picture."""
        if "unreachable" in row:
            return {}
        dense = f"{DENSE}-1{'-int8' if row['int8'] else ''}"
        sessions = {
            name: Session(Bundle.open(path, "ort"))
            for name, path in ((DENSE, bundle.with_name(dense)), ("ours", bundle))
        }
        single = [sample for sample in self.samples if len(sample.images) == 1][:BLOCKS]
        ms: dict[str, dict[str, list[list[float]]]] = {
            part: {name: [] for name in sessions} for part in ("vision", "prefill", "both")
        }
        for number, sample in enumerate(single):
            names = list(sessions) if number % 2 == 0 else list(reversed(sessions))
            for name in names:
                found = [first_token(sessions[name], sample) for _ in range(REPEATS + 1)][1:]
                ms["vision"][name].append([vision for vision, _ in found])
                ms["prefill"][name].append([prefill for _, prefill in found])
                ms["both"][name].append([sum(parts) for parts in found])
        timings = {part: Timings(ms=arrays(by_name)) for part, by_name in ms.items()}
        return {
            "vision_ms": timings["vision"].median("ours"),
            "prefill_ms": timings["prefill"].median("ours"),
            "first_token_ms": timings["both"].median("ours"),
            "select_ms": select_ms(bundle, single[:REPEATS]),
            "vision_speedup": vars_of(timings["vision"]),
            "prefill_speedup": vars_of(timings["prefill"]),
            "first_token_speedup": vars_of(timings["both"]),
        }


def arrays(by_name: Mapping[str, list[list[float]]]) -> dict[str, np.ndarray]:
    """Lists of blocks as arrays."""
    return {name: np.array(blocks) for name, blocks in by_name.items()}


def vars_of(timings: Timings) -> list[float]:
    """The dense bundle's time over ours, with its interval."""
    ratio = timings.paired(DENSE, "ours")
    return [ratio.value, ratio.low, ratio.high]


def first_token(session: Session, sample: Sample) -> tuple[float, float]:
    """Milliseconds of the pictures and of the prompt, up to a first token."""
    found = session.generate(sample.messages, sample.images, max_new_tokens=1, temperature=0.0)
    return found.timings.vision_ms, found.timings.prefill_ms


def select_ms(bundle: Path, samples: Sequence[Sample]) -> float:
    """Milliseconds of the nodes that score, choose and move tokens, a question, in a profile.

    A profile adds some microseconds to every node, so that this is rather too much.
    """
    plain = engine.session_options
    with tempfile.TemporaryDirectory() as folder:

        def profiled(*arguments: Any) -> Any:
            options = plain(*arguments)
            options.enable_profiling = True
            options.profile_file_prefix = f"{folder}/profile"
            return options

        engine.session_options = profiled
        try:
            session = Session(Bundle.open(bundle, "ort"))
        finally:
            engine.session_options = plain
        for sample in samples:
            first_token(session, sample)
        # A profile is written as its session goes.
        del session
        gc.collect()
        events = [
            event
            for path in Path(folder).iterdir()
            for event in json.loads(path.read_text())
            if event.get("name", "").endswith("_kernel_time")
        ]
    assert events, "the bundle was run"
    spent = sum(event["dur"] for event in events if event["name"].startswith(CHOOSING))
    return float(spent) / 1000 / len(samples)


if __name__ == "__main__":
    main()
