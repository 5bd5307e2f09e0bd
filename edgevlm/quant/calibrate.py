"""Calibration: samples with their right answers, and what each part of the model sees of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from tokenizers import Tokenizer
from torch import Tensor

from edgevlm.evidence.fed import (
    Fed,
    Visual,
    asking_of,
    inputs_along,
    pixels_of,
    visual_of,
)
from edgevlm.evidence.witness import Question, ask
from edgevlm.model.attention import FullCache
from edgevlm.model.decoder import Decoder, Rows
from edgevlm.model.stages import Seen
from edgevlm.model.vision import GridTables, Vision, VisionRows, grid_tables
from edgevlm.model.vlm import Vlm
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
    num_axes: int | None = None,
) -> list[CalibrationCase]:
    """Preprocess samples as the runtime does, and encode their first answers.

    `num_axes` are those of the rotary embedding.
    """
    cases = []
    for sample in samples:
        tokens = tokenizer.encode(sample.answers[0], add_special_tokens=False).ids
        question = ask(sample, image, text, tokenizer, num_axes)
        cases.append(CalibrationCase(question=question, answer=(*tokens, end_token)))
    return cases


StateT = TypeVar("StateT", VisionRows, Rows)


@dataclass(kw_only=True, slots=True)
class LayerCalls(Generic[StateT]):
    """The calls of a stack of layers, layer by layer: the rows of each, and how they pass one."""

    states: list[StateT]
    steps: list[Callable[[int, StateT], StateT]]

    def run(self, index: int) -> Iterator[StateT]:
        """What a layer makes of the rows, call by call."""
        for state, step in zip(self.states, self.steps, strict=True):
            yield step(index, state)

    def advance(self, index: int) -> None:
        """Take what a layer makes of the rows for the next one's."""
        for place, state in enumerate(self.run(index)):
            self.states[place] = state

    @property
    def rows(self) -> list[Tensor]:
        """The rows [B, T, W] of each call."""
        return [state.x for state in self.states]


def vision_calls(model: Vlm, cases: Sequence[CalibrationCase]) -> LayerCalls[VisionRows]:
    """The calls of the vision encoder's layers, one per picture or tile."""
    calls: LayerCalls[VisionRows] = LayerCalls(states=[], steps=[])
    for pixels, grid in _pictures(model, cases):
        tables = grid_tables(model.spec.vision, grid)
        calls.states.append(model.vision.entered(pixels, tables, grid).last())
        calls.steps.append(partial(_step_vision, model.vision, tables, grid))
    return calls


def _step_vision(
    vision: Vision, tables: GridTables | None, grid: tuple[int, int], index: int, rows: VisionRows
) -> VisionRows:
    return vision.step(index, rows, tables, grid).last()


def embed_pictures(model: Vlm, cases: Sequence[CalibrationCase]) -> None:
    """Run what makes rows of pixels, on every picture."""
    for pixels, _ in _pictures(model, cases):
        model.vision.embed(pixels)


Features = list[list[tuple[Seen, tuple[int, int]]]]
"""Of each sample what the encoder saw in its pictures, with their grids."""


def encode_features(model: Vlm, cases: Sequence[CalibrationCase]) -> Features:
    """Run the vision encoder on every picture."""
    return [
        [
            (model.vision(pixels, grid_tables(model.spec.vision, grid), grid), grid)
            for pixels, grid in _pictures(model, [case])
        ]
        for case in cases
    ]


def project_features(
    model: Vlm, cases: Sequence[CalibrationCase], features: Features
) -> list[Visual | None]:
    """The visual tokens of each sample, None where it has no pictures."""
    found: list[Visual | None] = []
    for case, pictures in zip(cases, features, strict=True):
        asking = asking_of(model, case.question)
        parts = [(model.project(seen, grid, asking), grid) for seen, grid in pictures]
        found.append(visual_of(model, parts))
    return found


def decoder_calls(
    model: Vlm,
    decoder: Decoder,
    cases: Sequence[CalibrationCase],
    visual: Sequence[Visual | None],
    *,
    answers: bool,
) -> LayerCalls[Rows]:
    """The calls of a decoder's layers, one per sample: its prompt, with its answer or without."""
    calls: LayerCalls[Rows] = LayerCalls(states=[], steps=[])
    for fed in decoder_inputs(model, cases, visual, answers=answers):
        hidden = model.hidden(fed.rows, fed.pictures)
        keys = model.whole_keys(fed.positions, hidden=hidden)
        calls.states.append(decoder.entered(fed.rows, None, fed.pictures))
        calls.steps.append(partial(_step_decoder, decoder, keys))
    return calls


def _step_decoder(decoder: Decoder, keys: Sequence[FullCache], index: int, rows: Rows) -> Rows:
    return decoder.step(index, rows, keys)


def run_head(decoder: Decoder, states: Sequence[Tensor]) -> None:
    """Run the head on the rows of every sample: its logits are many, and none are kept."""
    for state in states:
        decoder.head(decoder.norm(state))


def decoder_inputs(
    model: Vlm,
    cases: Sequence[CalibrationCase],
    visual: Sequence[Visual | None],
    *,
    answers: bool,
) -> Iterator[Fed]:
    """What a decoder is fed for each sample: its prompt, with its answer or without."""
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
