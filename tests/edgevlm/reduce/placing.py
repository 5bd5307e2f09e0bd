"""Models whose visual tokens are moved, and where the rows of a prompt then stand, slowly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevlm.checkpoint import Checkpoint, load, open_checkpoint
from edgevlm.evidence.witness import Question, ask
from edgevlm.families.image_spec import ImageChoices
from edgevlm.families.text_spec import tokenizer_json
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes import Change, Reduce, run_pass
from edgevlm.samples import Sample
from edgevlm_runtime.image import ImageSpec
from edgevlm_runtime.text import TextSpec, load_tokenizer
from tests.edgevlm.calibrated import context
from tests.edgevlm.tiny import tiny_spec

MODELS = Path(__file__).parents[3] / "recipes" / "models"
GRIDS = ((8, 12), (6, 6))
"""Patch grids of the tiny Qwen2.5-VL: 4 x 6 and 3 x 3 visual tokens."""
PLACES = Sequence[Sequence[float]]


@lru_cache
def qwen() -> Checkpoint:
    return open_checkpoint(str(MODELS / "qwen2_5-vl-tiny"))


def qwen_spec(*grids: tuple[int, int]) -> VlmSpec:
    """The tiny Qwen2.5-VL, with its processor and template."""
    return qwen().spec(ImageChoices(grids=grids or GRIDS))


def qwen_model(*grids: tuple[int, int]) -> Vlm:
    return load(qwen(), qwen_spec(*grids))


def llava_spec() -> VlmSpec:
    """A tiny LLaVA of 4 x 4 visual tokens, which speaks as the tiny Qwen2.5-VL does."""
    text = {**qwen_spec().text, "positions": "sequential"}
    spec = replace(tiny_spec(), text=text, image_token_id=text["image_token_id"])
    return replace(spec, decoder=replace(spec.decoder, vocab_size=2048))


def reduction(**options: Any) -> Reduce:
    """The pass, with its options as a file has them."""
    if "stages" in options:
        options["stages"] = tuple(options["stages"])
    return Reduce.model_validate(options)


def foreseen(spec: VlmSpec, **options: Any) -> VlmSpec:
    """The spec after a reduction."""
    return reduction(**options).foresee(spec, context()).spec


def reduced(model: Vlm, **options: Any) -> Change:
    """Reduce a model."""
    return run_pass(reduction(**options), model, context())


def asked(spec: VlmSpec, *sizes: tuple[int, int], turns: int = 1) -> Question:
    """Pictures of these sizes (width, height) in as many turns, the last one without an answer."""
    random = np.random.default_rng(len(sizes))
    images = [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]
    shares = np.array_split(np.arange(len(images)), turns)
    messages: list[dict[str, Any]] = []
    for turn, share in enumerate(shares):
        parts: list[dict[str, Any]] = [{"type": "image"} for _ in share]
        parts.append({"type": "text", "text": f"and what is number {turn}?"})
        messages.append({"role": "user", "content": parts})
        if turn + 1 < turns:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": "red"}]})
    sample = Sample(images=tuple(images), messages=tuple(messages), answers=("x",), task="count")
    text = TextSpec.from_json(spec.text)
    tokenizer = load_tokenizer(tokenizer_json(qwen().folder, TextSpec.from_json(qwen_spec().text)))
    num_axes = spec.decoder.rope.num_axes
    return ask(sample, ImageSpec.from_json(spec.image), text, tokenizer, num_axes)


def walked(
    question: Question, places: Sequence[PLACES], spans: Sequence[float], axes: int
) -> tuple[np.ndarray, float]:
    """Positions [A, T] and the next one, row by row: offsets and a span for each picture group."""
    prompt = question.prompt
    is_visual = np.zeros(len(prompt.token_ids), bool)
    is_visual[prompt.image_rows] = True
    starts = prompt.picture_rows.tolist()
    found, position, row = [], 0.0, 0
    while row < len(is_visual):
        if is_visual[row]:
            group = starts.index(row)
            found += [[position + offset for offset in offsets] for offsets in places[group]]
            row += len(places[group])
            position += spans[group]
        else:
            found.append([position] * axes)
            position += 1
            row += 1
    return np.array(found).T, position
