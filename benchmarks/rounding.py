"""What ways to round 4-bit weights cost: KL of the logits to the float model's, on many samples.

The decoder of scenes-vlm in int4 groups of 32, all else in float32. Questions of the evaluation
split are answered along their right answers, and every row that predicts a token counts. Few rows
make most of a mean KL, so a ratio of means has an interval, from a bootstrap over questions that
are the same for all. Usage:

    python benchmarks/rounding.py --samples 1008 --json devices/reports/rounding.json
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from paired import Ratio, parser, report

from edgevlm.checkpoint import load, open_checkpoint
from edgevlm.device import load_device
from edgevlm.families.image_spec import ImageChoices
from edgevlm.families.text_spec import tokenizer_json
from edgevlm.model.vlm import Vlm
from edgevlm.passes import Context, FoldNorms, Pass, Quantize, run_pass
from edgevlm.passes.awq import Awq
from edgevlm.passes.rotate import Rotate
from edgevlm.quant.calibrate import (
    CalibrationCase,
    calibration_cases,
    encode_features,
    project_features,
)
from edgevlm.quant.harm import logits_along
from edgevlm.samples import draw_samples
from edgevlm_runtime.images.spec import ImageSpec
from edgevlm_runtime.text import TextSpec, load_tokenizer

MODEL = Path("recipes/models/scenes-vlm")
CALIBRATION = 128
GRID: dict[str, Any] = {"scheme": "w4a16", "group_size": 32}
AWQ = Awq(ranges="mse", components=("decoder",), **GRID)
BASE = "rtn, minmax"
WAYS: Mapping[str, tuple[Sequence[Pass], dict[str, Any]]] = {
    BASE: ((), {"method": "rtn", "ranges": "minmax"}),
    "rtn": ((), {"method": "rtn"}),
    "hqq": ((), {"method": "hqq"}),
    "awq, rtn": ((AWQ,), {"method": "rtn"}),
    "gptq": ((), {"method": "gptq"}),
    "awq, gptq": ((AWQ,), {"method": "gptq"}),
    "rotate, gptq": ((FoldNorms(), Rotate()), {"method": "gptq"}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """KL of every row, question by question, and how many rows kept their best token."""

    rows: list[NDArray[np.float64]]
    same: int

    @property
    def sums(self) -> NDArray[np.float64]:
        """KL of every question."""
        return np.array([rows.sum() for rows in self.rows])


def main() -> None:
    """Round in every way, and print what it costs."""
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=1008)
    options.add_argument("--only", nargs="*", choices=list(WAYS), default=list(WAYS))
    arguments = options.parse_args()
    figures: dict[str, Any] = {"questions": arguments.samples, "calibration": CALIBRATION}
    with torch.no_grad():
        bench = Bench(arguments.samples)
        base: Losses | None = None
        for name in dict.fromkeys([BASE, *arguments.only]):
            found = bench.losses(*WAYS[name])
            base = base or found
            figures |= figures_of(name, found, base)
            print(name, f"{figures[f'{name}: kl']:.6f}", figures[f"{name}: kl to {BASE}"])
    report("rounding", figures, arguments)


class Bench:
    """The float model, its logits, and the samples that calibrate and judge."""

    def __init__(self, samples: int) -> None:
        """Load the model and answer all questions in float."""
        checkpoint = open_checkpoint(str(MODEL), None)
        spec = checkpoint.spec(ImageChoices())
        self.model = load(checkpoint, spec)
        text = TextSpec.from_json(spec.text)
        tokenizer = load_tokenizer(tokenizer_json(checkpoint.folder, text))
        image, end = ImageSpec.from_json(spec.image), min(spec.generation.eos_token_ids)

        def cases(split: str, count: int, seed: int) -> list[CalibrationCase]:
            drawn = draw_samples(None, split=split, count=count, seed=seed)
            return calibration_cases(drawn, image, text, tokenizer, end)

        self.calibration = cases("calibration", CALIBRATION, 1)
        self.asked = cases("evaluation", samples, 0)
        self.features = encode_features(self.model, self.asked)
        self.reference = [log_softmax(rows) for rows in self.logits(self.model)]

    def logits(self, model: Vlm) -> list[NDArray[np.float32]]:
        """Logits along the right answers, of the float encoder's pictures in the model's rows."""
        return logits_along(model, self.asked, project_features(model, self.asked, self.features))

    def losses(self, before: Sequence[Pass], rounding: Mapping[str, Any]) -> Losses:
        """What a copy of the model loses that is prepared and rounded so."""
        model = copy.deepcopy(self.model)
        model.tie()
        context = Context(
            device=load_device("host-cpu"), targets=("ort",), calibration=lambda _: self.calibration
        )
        quantize = Quantize.model_validate({"decoder": {**GRID, **rounding}})
        for step in (*before, quantize):
            run_pass(step, model, context)
        rows, same = [], 0
        for want, got in zip(self.reference, map(log_softmax, self.logits(model)), strict=True):
            rows.append((np.exp(want) * (want - got)).sum(axis=1))
            same += int((want.argmax(axis=1) == got.argmax(axis=1)).sum())
        return Losses(rows=rows, same=same)


def figures_of(name: str, found: Losses, base: Losses) -> dict[str, Any]:
    """Mean KL, its ratio to the base's, and the typical ratio of a row."""
    ours, theirs = found.sums, base.sums
    picks = np.random.default_rng(0).integers(0, len(ours), (2000, len(ours)))
    low, high = np.percentile(ours[picks].sum(axis=1) / theirs[picks].sum(axis=1), [2.5, 97.5])
    rows, others = np.concatenate(found.rows), np.concatenate(base.rows)
    tiny = 1e-12
    typical = np.exp(np.mean(np.log(np.abs(rows) + tiny) - np.log(np.abs(others) + tiny)))
    return {
        f"{name}: kl": float(rows.mean()),
        f"{name}: kl to {BASE}": Ratio(
            value=float(ours.sum() / theirs.sum()), low=float(low), high=float(high)
        ),
        f"{name}: typical": float(typical),
        f"{name}: 99th percentile": float(np.percentile(rows, 99)),
        f"{name}: argmax": found.same / len(rows),
    }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of probabilities, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


if __name__ == "__main__":
    main()
