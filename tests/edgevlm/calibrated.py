"""Calibration samples made by hand, and passes that are run on them, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.device import load_device
from edgevlm.evidence.witness import Question
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes import Change, Context, Quantize, run_pass
from edgevlm.quant.calibrate import CalibrationCase
from edgevlm_runtime.image import PreparedImage
from edgevlm_runtime.images.spec import ImageLayout
from edgevlm_runtime.text import EncodedPrompt


def samples_of(
    spec: VlmSpec, count: int = 3, *, answer: int = 4, seed: int = 0
) -> list[CalibrationCase]:
    """A picture of noise between a few tokens, and a few tokens of answer, all from a seed."""
    random = np.random.default_rng(seed)
    grid = spec.vision.grids[0]
    rows = spec.image_tokens(grid)
    is_native = spec.vision.pixels == "patches"
    shape = spec.vision.pixels_shape(grid)
    layout = ImageLayout(tokens=(rows,), grid=grid if is_native else None)
    cases = []
    for _ in range(count):
        words = random.integers(3, spec.image_token_id, 6)
        ids = np.concatenate([words[:2], [spec.image_token_id] * rows, words[2:]]).astype(np.int64)
        pixels = random.standard_normal(shape if is_native else (1, *shape)).astype(np.float32)
        image = PreparedImage(feeds=({"pixels": pixels},), layout=layout)
        prompt = EncodedPrompt(
            token_ids=ids,
            image_rows=np.flatnonzero(ids == spec.image_token_id),
            positions=np.arange(len(ids)),
            next_position=len(ids),
        )
        tokens = random.integers(3, spec.image_token_id, answer)
        cases.append(
            CalibrationCase(
                question=Question(images=(image,), prompt=prompt),
                answer=tuple(int(token) for token in tokens),
            )
        )
    return cases


def context(
    cases: Sequence[CalibrationCase] = (),
    *,
    targets: tuple[str, ...] = ("ort",),
    device: str = "host-cpu",
    **more: Any,
) -> Context:
    """What a pass may look at, with these calibration samples."""
    return Context(device=load_device(device), targets=targets, calibration=lambda _: cases, **more)


def quantized(
    model: Vlm,
    options: dict[str, Any],
    cases: Sequence[CalibrationCase] | None = None,
    *,
    targets: tuple[str, ...] = ("ort",),
    work: Path | None = None,
) -> Change:
    """Run the pass on a model, as a recipe writes its options; what it reports."""
    known = samples_of(model.spec) if cases is None else cases
    step = Quantize.model_validate(options)
    return run_pass(step, model, context(known, targets=targets, work=work))
