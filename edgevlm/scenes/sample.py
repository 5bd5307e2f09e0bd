"""A sample: pictures, a conversation about them, and the answers that are right."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypedDict

from PIL import Image

from edgevlm.scenes.ask import Question, ask, ask_about
from edgevlm.scenes.draw import draw_scene
from edgevlm.scenes.scene import SPLITS, Scene, check_split, make_scene
from edgevlm.scenes.words import TASKS
from edgevlm_runtime.errors import InputError

_PAIR_SHARE = 0.1
_TURNS_SHARE = 1 / 3
# Every drawing takes its pictures from a stretch of the split this long.
_STRETCH = 100_000


class Part(TypedDict, total=False):
    """One part of a message: `{"type": "image"}` or `{"type": "text", "text": ...}`."""

    type: str
    text: str


class Message(TypedDict):
    """One message of a conversation, as chat templates take it."""

    role: str
    content: list[Part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Pictures and a conversation that ends with a question, with every right answer to it.

    The pictures belong, in order, to the image parts of the messages.
    """

    images: tuple[Image.Image, ...]
    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    task: str


def scenes_samples(split: str, count: int, seed: int) -> list[Sample]:
    """Draw samples from a split, the tasks equally often; one seed gives the same samples always.

    One in ten shows two pictures, one in three has earlier turns with their true answers.
    """
    if split not in SPLITS:
        check_split(split, 0)
    num_stretches = len(SPLITS[split]) // _STRETCH
    if not 0 <= seed < num_stretches:
        raise InputError(
            f"seed {seed} is outside 0 to {num_stretches - 1}", hint="use a smaller seed"
        )
    first = SPLITS[split].start + seed * _STRETCH
    if count * 20 > _STRETCH:
        raise InputError(
            f"cannot draw {count} samples from one seed, the most is {_STRETCH // 20}",
            hint="draw the rest with another seed",
        )
    rng = random.Random(f"{split} {seed}")
    samples: list[Sample] = []
    scenes = (make_scene(check_split(split, first + index)) for index in range(_STRETCH))
    while len(samples) < count:
        task = TASKS[len(samples) % len(TASKS)]
        num_pictures = 2 if rng.random() < _PAIR_SHARE else 1
        num_turns = rng.choice((2, 3)) if rng.random() < _TURNS_SHARE else 1
        questions = None
        while questions is None:
            shown = [next(scenes) for _ in range(num_pictures)]
            questions = _converse(shown, task, num_turns, rng)
        samples.append(_sample(shown, questions))
    return samples


def conversation(num_pictures: int, turns: list[tuple[str, str]], question: str) -> list[Message]:
    """Messages with the pictures first, earlier (question, answer) turns, and a last question."""
    messages: list[Message] = []
    for text, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
    images: list[Part] = [{"type": "image"} for _ in range(num_pictures)]
    messages[0]["content"] = [*images, *messages[0]["content"]]
    return messages


def _converse(
    scenes: list[Scene], task: str, num_turns: int, rng: random.Random
) -> list[Question] | None:
    """Questions that end with one of the task, or None where the scenes allow none."""
    questions: list[Question] = []
    for wanted in (*(rng.choice(TASKS[:-1]) for _ in range(num_turns - 1)), task):
        picture = rng.randrange(len(scenes))
        question = ask(scenes[picture], wanted, rng)
        if question is None:
            return None
        questions.append(question if len(scenes) == 1 else ask_about(question, picture))
    return questions


def _sample(scenes: list[Scene], questions: list[Question]) -> Sample:
    turns = [(question.text, question.answer) for question in questions[:-1]]
    last = questions[-1]
    return Sample(
        images=tuple(draw_scene(scene) for scene in scenes),
        messages=tuple(conversation(len(scenes), turns, last.text)),
        answers=(last.answer,),
        task=last.task,
    )
