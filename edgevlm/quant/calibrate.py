"""Calibration: samples with their right answers, and what each part of the model sees of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from edgevlm.evidence.eager import inputs_along, pixels_of
from edgevlm.evidence.witness import Question, ask
from edgevlm.model.vision import grid_tables
from edgevlm.model.vlm import Decoder, Vlm
from edgevlm.samples import Sample
from edgevlm_runtime.image import ImageSpec
from edgevlm_runtime.text import TextSpec

__all__ = ["CalibrationCase", "LayerCalls", "calibration_cases", "decoder_calls", "vision_calls"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationCase:
    """A preprocessed sample and the tokens of its right answer, which ends as generation does."""

    question: Question
    answer: tuple[int, ...]


def calibration_cases(
    samples: Sequence[Sample],
    image: ImageSpec,
    text: TextSpec,
    tokenizer: Tokenizer,
    end_token: int,
) -> list[CalibrationCase]:
    """Preprocess samples as the runtime does, and encode their first answers."""
    cases = []
    for sample in samples:
        tokens = tokenizer.encode(sample.answers[0], add_special_tokens=False).ids
        question = ask(sample, image, text, tokenizer)
        cases.append(CalibrationCase(question=question, answer=(*tokens, end_token)))
    return cases


@dataclass(kw_only=True, slots=True)
class LayerCalls:
    """The calls of a stack of layers, layer by layer: what each reads, and the rest of the call."""

    layers: Sequence[nn.Module]
    states: list[Tensor]
    others: list[tuple[Any, ...]]

    def run(self, layer: nn.Module) -> Iterator[Tensor]:
        """What the layer makes of the states, call by call."""
        for state, other in zip(self.states, self.others, strict=True):
            yield layer(state, *other)

    def advance(self, layer: nn.Module) -> None:
        """Take what the layer makes of the states for the next one's."""
        for index, state in enumerate(self.run(layer)):
            self.states[index] = state


class _Stop(Exception):  # noqa: N818 - it ends a forward pass on purpose
    """The first layer was reached."""


def _first_calls(layers: nn.ModuleList, runs: Iterator[Callable[[], object]]) -> LayerCalls:
    """What the first layer of a stack is called with in each run, which ends there."""
    calls = LayerCalls(layers=list(layers), states=[], others=[])

    def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.states.append(inputs[0])
        calls.others.append(inputs[1:])
        raise _Stop

    handle = layers[0].register_forward_pre_hook(note)
    try:
        for run in runs:
            try:
                run()
            except _Stop:
                continue
    finally:
        handle.remove()
    return calls


def vision_calls(model: Vlm, cases: Sequence[CalibrationCase]) -> LayerCalls:
    """The calls of the vision encoder's layers, one per picture or tile."""

    def runs() -> Iterator[Callable[[], object]]:
        for pixels, grid in _pictures(model, cases):
            tables = grid_tables(model.spec.vision, grid)
            yield partial(model.vision, pixels, tables)

    return _first_calls(model.vision.layers, runs())


def embed_pictures(model: Vlm, cases: Sequence[CalibrationCase]) -> None:
    """Run what makes rows of pixels, on every picture."""
    for pixels, _ in _pictures(model, cases):
        model.vision.embed(pixels)


Features = list[list[tuple[Tensor, tuple[int, int]]]]
"""Of each sample the features of its pictures, with their grids."""


def encode_features(model: Vlm, cases: Sequence[CalibrationCase]) -> Features:
    """Run the vision encoder on every picture."""
    return [
        [
            (model.vision(pixels, grid_tables(model.spec.vision, grid)), grid)
            for pixels, grid in _pictures(model, [case])
        ]
        for case in cases
    ]


def project_features(model: Vlm, features: Features) -> list[Tensor | None]:
    """The visual rows [M, W] of each sample, None where it has no pictures."""
    rows: list[Tensor | None] = []
    for pictures in features:
        parts = [model.projector(x, grid).flatten(0, -2) for x, grid in pictures]
        rows.append(torch.cat(parts) if parts else None)
    return rows


def decoder_calls(
    model: Vlm,
    decoder: Decoder,
    cases: Sequence[CalibrationCase],
    visual: Sequence[Tensor | None],
    *,
    answers: bool,
) -> LayerCalls:
    """The calls of a decoder's layers, one per sample: its prompt, with its answer or without."""

    inputs = decoder_inputs(model, cases, visual, answers=answers)
    runs = (partial(model.whole, decoder, rows, places) for rows, places in inputs)
    return _first_calls(decoder.layers, runs)


def run_head(decoder: Decoder, states: Sequence[Tensor]) -> None:
    """Run the head on the rows of every sample: its logits are many, and none are kept."""
    for state in states:
        decoder.head(decoder.norm(state))


def decoder_inputs(
    model: Vlm,
    cases: Sequence[CalibrationCase],
    visual: Sequence[Tensor | None],
    *,
    answers: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows [1, T, W] and their positions, of each sample's prompt, with its answer or without."""
    for case, rows in zip(cases, visual, strict=True):
        yield inputs_along(model, case.question, rows, case.answer if answers else ())


def _pictures(
    model: Vlm, cases: Sequence[CalibrationCase]
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    for case in cases:
        for image in case.question.images:
            grid = image.layout.grid or model.spec.vision.grids[0]
            for feed in image.feeds:
                yield pixels_of(feed), grid
