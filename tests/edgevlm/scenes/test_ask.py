"""Questions: each answer is derived again from the facts, by other code."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from edgevlm.scenes import SPLITS, TASKS, Scene, make_scene, scenes_samples
from edgevlm.scenes.ask import Question, ask, ask_about
from edgevlm.scenes.scene import Thing
from edgevlm.scenes.words import COLOURS, SHAPES, SIZES
from edgevlm_runtime.errors import InputError


def _ask_all(task: str, count: int) -> list[tuple[Scene, Question]]:
    rng = random.Random(task)
    asked = []
    for seed in range(10_000, 10_000 + count):
        scene = make_scene(seed)
        question = ask(scene, task, rng)
        if question is not None:
            asked.append((scene, question))
    return asked


def _matching(scene: Scene, phrase: str) -> list[Thing]:
    """The objects that a phrase such as 'the large red object at the top left' fits."""
    place = re.search(r"(?:at|in) the ([a-z ]+)$", phrase)
    words = (phrase[: place.start()] if place else phrase).split()
    things = list(scene.things)
    for word in words:
        singular = word.removesuffix("es") if word == "crosses" else word.removesuffix("s")
        if word in COLOURS:
            things = [thing for thing in things if thing.colour == word]
        elif word in SIZES:
            things = [thing for thing in things if thing.size == word]
        elif word in SHAPES or singular in SHAPES:
            things = [thing for thing in things if thing.shape in (word, singular)]
    if place:
        things = [thing for thing in things if _region(thing.box) == place[1]]
    return things


def _region(box: tuple[int, int, int, int]) -> str:
    across = "left" if box[0] + box[2] < 64 else "right" if box[0] + box[2] >= 128 else ""
    down = "top" if box[1] + box[3] < 64 else "bottom" if box[1] + box[3] >= 128 else ""
    return f"{down} {across}".strip() or "centre"


_NAMED = r"(the (?:small |large )?(?:[a-z]+ )?[a-z]+(?: (?:at|in) the [a-z ]+)?)"


def _one(scene: Scene, text: str, patterns: tuple[str, ...]) -> Thing | None:
    for pattern in patterns:
        match = re.fullmatch(pattern.replace("@", _NAMED), text)
        if match:
            if match[1] == "the sign":
                return None
            found = _matching(scene, match[1])
            assert len(found) == 1, text
            return found[0]
    raise AssertionError(f"no pattern for {text!r}")


def test_exists() -> None:
    asked = _ask_all("exists", 1500)
    for scene, question in asked:
        phrase = re.search(r"\ban? ([a-z]+(?: [a-z]+)?)(?: visible)?\?$", question.text)
        assert phrase is not None
        found = _matching(scene, phrase[1].removesuffix(" visible"))
        assert question.answer == ("yes" if found else "no")
        if not found:
            shared = [
                thing
                for thing in scene.things
                if thing.colour in phrase[1] or thing.shape in phrase[1]
            ]
            assert (
                shared
                or len(phrase[1].removesuffix(" visible").split()) == 1
                or ("object" in phrase[1])
            )
    share = sum(question.answer == "yes" for _, question in asked) / len(asked)
    assert 0.46 < share < 0.54


def test_colour_and_shape() -> None:
    for task in ("colour", "shape"):
        patterns = (
            rf"(?:What|Which) {task} is @\?",
            rf"What is the {task} of @\?",
            rf"Name the {task} of @\.",
        )
        asked = _ask_all(task, 1000)
        for scene, question in asked:
            thing = _one(scene, question.text, patterns)
            assert thing is not None
            assert getattr(thing, task) == question.answer
        counts = Counter(question.answer for _, question in asked)
        assert max(counts.values()) / len(asked) < 0.25


def test_count() -> None:
    asked = _ask_all("count", 1500)
    for scene, question in asked:
        match = re.search(
            r"(?:How many|Count the|number of) ([a-z]+(?: objects)?)"
            r"(?: are there| can you see)?[?.]$",
            question.text,
        )
        assert match is not None
        assert question.answer == str(len(_matching(scene, match[1])))
    counts = Counter(question.answer for _, question in asked)
    assert set(counts) == {"0", "1", "2", "3", "4", "5", "6"}
    assert max(counts.values()) / len(asked) < 0.35


def test_where() -> None:
    patterns = (
        r"Where is @\?",
        r"In which part is @\?",
        r"What is the position of @\?",
        r"Locate @\.",
    )
    asked = _ask_all("where", 1000)
    for scene, question in asked:
        thing = _one(scene, question.text, patterns)
        box = scene.sign.box if thing is None and scene.sign else thing.box if thing else None
        assert box is not None
        assert question.answer == _region(box)
    counts = Counter(question.answer for _, question in asked)
    assert len(counts) == 9
    assert max(counts.values()) / len(asked) < 0.2


def test_box() -> None:
    patterns = (
        r"What is the box of @\?",
        r"Give the box of @\.",
        r"Which box holds @\?",
        r"Draw a box around @\.",
    )
    for scene, question in _ask_all("box", 600):
        thing = _one(scene, question.text, patterns)
        assert thing is not None
        left, top = thing.left // 3, thing.top // 3
        right, bottom = (thing.left + thing.side - 1) // 3, (thing.top + thing.side - 1) // 3
        assert question.answer == f"{left} {top} {right} {bottom}"


def test_read() -> None:
    asked = _ask_all("read", 400)
    assert len(asked) > 100
    for scene, question in asked:
        assert scene.sign is not None
        assert question.answer == scene.sign.text


def test_relation() -> None:
    patterns = (
        r"Where is (?P<a>the .+) relative to (?P<b>the .+)\?",
        r"Is (?P<a>the .+) left, right, above or below (?P<b>the .+)\?",
        r"On which side of (?P<b>the .+) is (?P<a>the .+)\?",
        r"Seen from (?P<b>the .+), where is (?P<a>the .+)\?",
    )
    asked = _ask_all("relation", 1500)
    for scene, question in asked:
        match = next(filter(None, (re.fullmatch(p, question.text) for p in patterns)))
        (first,), (second,) = _matching(scene, match["a"]), _matching(scene, match["b"])
        across = first.left + first.side / 2 - second.left - second.side / 2
        down = first.top + first.side / 2 - second.top - second.side / 2
        assert abs(abs(across) - abs(down)) >= 8
        if abs(across) > abs(down):
            assert question.answer == ("left" if across < 0 else "right")
        else:
            assert question.answer == ("above" if down < 0 else "below")
    counts = Counter(question.answer for _, question in asked)
    assert max(counts.values()) / len(asked) < 0.31


def test_describe_names_everything_in_order() -> None:
    for scene, question in _ask_all("describe", 300):
        text = question.answer
        at = -1
        for thing in scene.things:
            preposition = "in" if thing.region == "centre" else "at"
            phrase = f"a {thing.size} {thing.colour} {thing.shape} {preposition} the {thing.region}"
            assert text.index(phrase, at + 1) > at
            at = text.index(phrase, at + 1)
        assert text.count(" a ") == len(scene.things) + (scene.sign is not None)
        assert text.startswith(f"The picture shows {len(scene.things)} object")
        assert (scene.sign is not None) == ("sign" in text)
        if scene.sign is not None:
            assert f'says "{scene.sign.text}"' in text


def test_questions_about_one_of_two_pictures() -> None:
    question = Question(task="read", text="Read the sign.", answer="K7")
    assert ask_about(question, 1).text == "In the second picture, read the sign."


def test_samples_are_drawn_equally_and_repeat() -> None:
    samples = scenes_samples("calibration", 450, 3)
    assert Counter(sample.task for sample in samples) == dict.fromkeys(TASKS, 50)
    pairs = sum(len(sample.images) == 2 for sample in samples) / len(samples)
    several = sum(len(sample.messages) > 1 for sample in samples) / len(samples)
    # About three standard deviations.
    assert abs(pairs - 0.1) < 0.045
    assert abs(several - 1 / 3) < 0.07
    for sample in samples:
        parts = [part for message in sample.messages for part in message["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(sample.images)
        assert [message["role"] for message in sample.messages] == [
            "assistant" if turn % 2 else "user" for turn in range(len(sample.messages))
        ]
        assert all(image.size == (96, 96) and image.mode == "RGB" for image in sample.images)
        asks_ordinal = "picture, " in sample.messages[-1]["content"][-1]["text"]
        assert asks_ordinal == (len(sample.images) == 2)
    again = scenes_samples("calibration", 45, 3)
    assert [sample.messages for sample in again] == [sample.messages for sample in samples[:45]]
    assert [image.tobytes() for sample in again for image in sample.images] == [
        image.tobytes() for sample in samples[:45] for image in sample.images
    ]


def test_samples_out_of_range() -> None:
    with pytest.raises(InputError) as caught:
        scenes_samples("calibration", 9, 1000)
    assert str(caught.value) == "seed 1000 is outside 0 to 999\n  hint: use a smaller seed"
    with pytest.raises(InputError) as caught:
        scenes_samples("evaluation", 5001, 0)
    assert str(caught.value) == (
        "cannot draw 5001 samples from one seed, the most is 5000\n"
        "  hint: draw the rest with another seed"
    )
    assert SPLITS["evaluation"].stop - SPLITS["evaluation"].start == 1000 * 100_000
