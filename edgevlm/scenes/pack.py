"""Packs many questions about one prompt's pictures into rows behind a shared prefix.

A prefix is `<|user|>` and the visual tokens. A segment continues it with one conversation about
those pictures: question, `<|assistant|>`, answer, `<|end|>`, and further turns. Positions restart
after the prefix, so that each segment is computed exactly as if it were alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgevlm.scenes.ask import Question, ask, ask_about
from edgevlm.scenes.dense import NUM_PATCHES
from edgevlm.scenes.scene import Scene
from edgevlm.scenes.words import TASKS

NO_LABEL = -100
# A description names some twenty facts, a box four, a sign two to four characters.
_TASK_WEIGHTS = {"describe": 4.0, "box": 2.0, "read": 2.0}
_END_WEIGHT = 0.1
# How often a task is asked after every task was asked once: more those that are learned slowest.
_ASKED = {
    "exists": 2,
    "colour": 1,
    "shape": 1,
    "count": 3,
    "where": 1,
    "read": 1,
    "relation": 2,
    "box": 1,
}
_PRACTICE_WEIGHT = 12
_PRACTICE_DESCRIBED = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What packing needs of the tokenizer."""

    encode: Callable[[str], list[int]]
    user: int
    assistant: int
    end: int
    pad: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Rows of segments, all arrays (rows, width); labels belong to the token that comes next."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    tasks: NDArray[np.int64]
    answers: NDArray[np.int64]


def num_prefix(num_pictures: int) -> int:
    """Tokens before the first question."""
    return 1 + num_pictures * NUM_PATCHES


def draw_segments(
    scenes: Sequence[Scene], rng: random.Random, practice: Collection[str] = ()
) -> list[tuple[Question, ...]]:
    """More conversations than fit: a description of each picture, every task, then a mix.

    With tasks to practise, most questions are of these, and two pictures of three are not
    described.
    """

    def draw(task: str) -> Question | None:
        picture = rng.randrange(len(scenes))
        question = ask(scenes[picture], task, rng)
        if question is None or len(scenes) == 1:
            return question
        return ask_about(question, picture)

    segments: list[tuple[Question, ...]] = []
    for picture, scene in enumerate(scenes):
        if practice and rng.random() > _PRACTICE_DESCRIBED:
            continue
        question = ask(scene, "describe", rng)
        if question is not None:
            segments.append((question if len(scenes) == 1 else ask_about(question, picture),))
    tasks = [] if practice else rng.sample(list(_ASKED), len(_ASKED))
    often = [_PRACTICE_WEIGHT if task in practice else times for task, times in _ASKED.items()]
    tasks += rng.choices(list(_ASKED), often, k=40 - len(tasks))
    asked = [question for question in map(draw, tasks) if question is not None]
    while asked:
        turns = rng.choice((2, 3)) if rng.random() < 1 / 3 else 1
        segments.append(tuple(asked[:turns]))
        del asked[:turns]
    return segments


def pack(
    segments: Sequence[Sequence[Question]],
    vocabulary: Vocabulary,
    *,
    first_position: int,
    rows: int,
    width: int,
) -> Packed:
    """Lay segments into rows, each whole and in the first row with room; the rest is dropped."""
    shape = (rows, width)
    packed = Packed(
        ids=np.full(shape, vocabulary.pad, dtype=np.int64),
        positions=np.full(shape, first_position, dtype=np.int64),
        segments=np.full(shape, -1, dtype=np.int64),
        labels=np.full(shape, NO_LABEL, dtype=np.int64),
        weights=np.zeros(shape, dtype=np.float32),
        tasks=np.full(shape, -1, dtype=np.int64),
        answers=np.full(shape, -1, dtype=np.int64),
    )
    used = [0] * rows
    num_answers = 0
    for number, questions in enumerate(segments):
        ids, spans = segment_tokens(questions, vocabulary)
        # The last token is only ever a label.
        length = len(ids) - 1
        row = next((row for row in range(rows) if used[row] + length <= width), None)
        if row is None:
            continue
        start = used[row]
        used[row] += length
        place = (row, slice(start, start + length))
        packed.ids[place] = ids[:-1]
        packed.positions[place] = first_position + np.arange(length)
        packed.segments[place] = number
        for task, first, last in spans:
            # Tokens first .. last are the answer and its end, each predicted one place earlier.
            span = (row, slice(start + first - 1, start + last))
            packed.labels[span] = ids[first : last + 1]
            packed.weights[span] = _TASK_WEIGHTS.get(task, 1.0) / (last - first)
            packed.weights[row, start + last - 1] = _END_WEIGHT
            packed.tasks[span] = TASKS.index(task)
            packed.answers[span] = num_answers
            num_answers += 1
    return packed


def segment_tokens(
    questions: Sequence[Question], vocabulary: Vocabulary
) -> tuple[list[int], list[tuple[str, int, int]]]:
    """Token ids of a conversation, and for each answer its task, first token and end token."""
    ids: list[int] = []
    spans = []
    for turn, question in enumerate(questions):
        if turn:
            ids.append(vocabulary.user)
        ids += [*vocabulary.encode(question.text), vocabulary.assistant]
        first = len(ids)
        ids += [*vocabulary.encode(question.answer), vocabulary.end]
        spans.append((question.task, first, len(ids) - 1))
    return ids, spans
