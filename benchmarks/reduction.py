"""Every reduction method at every budget: accuracy by task, operations, and time to a first token.

A budget is the average of visual tokens over the decoder's layers, as a share of all: methods that
cut late and methods that cut early stand side by side at the same average, `random` and `uniform`
among them. What a schedule cannot reach is printed with the least that it can. Usage:

    python benchmarks/reduction.py --quick
    python benchmarks/reduction.py --questions 720 --json devices/reports/reduction.json \
        --plot devices/reports/reduction.svg

`--quick` asks our torch model 180 questions at 25 %. Without it every method is compiled for ONNX
Runtime at every budget and the bundles are asked; what is done is kept in --work, and a second run
goes on from there.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import parser, report

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
from edgevlm.reduce.catalogue import method_names
from edgevlm.reduce.plan import average_tokens
from edgevlm.samples import Sample, draw_samples, score_answers
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.image import ImageSpec
from edgevlm_runtime.session import Session
from edgevlm_runtime.text import TextSpec, load_tokenizer

PLACE = Path("recipes/reduction.yaml")
BUDGETS = (0.5, 0.25, 0.11, 0.056)
QUICK_BUDGET, QUICK_QUESTIONS = 0.25, 180
DENSE = "dense"
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
    options.add_argument("--plot", type=Path, help="write a picture of accuracy and operations")
    arguments = options.parse_args()
    names = arguments.only or [DENSE, *method_names()]
    if arguments.quick:
        rows = list(quick(names, arguments.questions or QUICK_QUESTIONS))
    else:
        rows = list(compiled(names, arguments.questions or 720, arguments.work))
    if arguments.plot is not None:
        from plots import pareto

        pareto(rows, arguments.plot)
    report("reduction", {"quick": arguments.quick, "rows": rows}, arguments)


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
    """What the plan says of a recipe: tokens, and what they cost."""
    plan = recipe_plan(recipe)
    dense = plan.spec.dense_tokens(plan.spec.vision.grids[0])
    average = average_tokens(plan.spec.segments)
    return {"tokens": average, "share": average / dense}


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


def compiled(names: Sequence[str], count: int, work: Path) -> Iterator[dict[str, Any]]:
    """Compile every method at every budget, and ask the bundles."""
    samples = draw_samples(None, split="evaluation", count=count, seed=0)
    asked = [(name, budget, False) for budget in BUDGETS for name in names if name != DENSE]
    asked += [(name, 0.25, True) for name in COMBINED if name in names]
    if DENSE in names:
        asked = [(DENSE, 1.0, False), (DENSE, 1.0, True), *asked]
    begun, done = time.monotonic(), 0
    for place, (name, budget, is_quantized) in enumerate(asked, 1):
        kept = work / f"{name}-{budget:g}{'-int8' if is_quantized else ''}.json"
        recipe = recipe_of(name, budget, is_quantized=is_quantized)
        key = digest(code_version(), recipe, count)
        row = json.loads(kept.read_text()) if kept.exists() else {}
        if row.get("key") != key:
            row = {"key": key, "method": name, "budget": budget, "int8": is_quantized}
            row |= measured(recipe, samples, work)
            work.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(row, indent=1))
            done += 1
            left = (time.monotonic() - begun) / done * (len(asked) - place)
            print(f"{place} of {len(asked)}, about {left / 60:.0f} min left", file=sys.stderr)
        yield from shown({name: value for name, value in row.items() if name != "key"})


def measured(recipe: Recipe, samples: Sequence[Sample], work: Path) -> dict[str, Any]:
    """Compile a recipe, ask the bundle, and throw it away."""
    bundle = work / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    try:
        figures = figures_of(recipe)
        compile_recipe(recipe, bundle, cache=StageCache(root=default_root()), progress=Silent())
    except PassError as error:
        return {"unreachable": error.message}
    session = Session(Bundle.open(bundle, "ort"))
    answers, vision, prefill = [], [], []
    for sample in samples:
        found = session.generate(sample.messages, sample.images, max_new_tokens=64, temperature=0.0)
        answers.append(found.text)
        if len(sample.images) == 1:
            vision.append(found.timings.vision_ms)
            prefill.append(found.timings.prefill_ms)
    shutil.rmtree(bundle)
    times = {
        "vision_ms": float(np.median(vision)),
        "prefill_ms": float(np.median(prefill)),
        "first_token_ms": float(np.median(np.add(vision, prefill))),
    }
    return figures | times | scored(samples, answers)


if __name__ == "__main__":
    main()
