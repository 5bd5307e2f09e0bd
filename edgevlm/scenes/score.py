"""Scores answers: exact match, overlap of boxes, agreement of descriptions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgevlm.scenes.sample import Sample
from edgevlm.scenes.words import COLOURS, GRADED_TASKS, REGIONS, SHAPES, SIZES, TASKS

LEAST_OVERLAP = 0.5
_Z = 1.959963984540054

Fact = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """The mean score of one task with its 95 % interval."""

    task: str
    mean: float
    low: float
    high: float
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores by task; the mean accuracy is over all but boxes and descriptions, each alike.

    It is None where nothing but boxes and descriptions was asked.
    """

    tasks: tuple[TaskScore, ...]
    mean_accuracy: float | None


def score(task: str, prediction: str, sample: Sample) -> float:
    """The score of an answer, 0 to 1: the best over the sample's right answers."""
    if task == "box":
        return max(float(overlap(prediction, answer) >= LEAST_OVERLAP) for answer in sample.answers)
    if task == "describe":
        return max(fact_f1(prediction, answer) for answer in sample.answers)
    given = normalize(prediction)
    return float(any(given == normalize(answer) for answer in sample.answers))


def summarize(results: Iterable[tuple[str, float]]) -> Scores:
    """Aggregate (task, score) pairs; Wilson intervals, for descriptions a normal one."""
    values: dict[str, list[float]] = {}
    for task, value in results:
        values.setdefault(task, []).append(value)
    known = [task for task in TASKS if task in values]
    tasks = []
    for task in (*known, *sorted(set(values) - set(known))):
        interval = normal_interval if task == "describe" else wilson_interval
        low, high = interval(values[task])
        tasks.append(
            TaskScore(
                task=task,
                mean=sum(values[task]) / len(values[task]),
                low=low,
                high=high,
                num_samples=len(values[task]),
            )
        )
    exact = [entry.mean for entry in tasks if entry.task not in GRADED_TASKS]
    return Scores(tasks=tuple(tasks), mean_accuracy=sum(exact) / len(exact) if exact else None)


def scores_json(scores: Scores) -> dict[str, Any]:
    """Scores as plain values for a report."""
    return {
        "mean_accuracy": scores.mean_accuracy,
        "tasks": {
            entry.task: {
                "accuracy": entry.mean,
                "low": entry.low,
                "high": entry.high,
                "n": entry.num_samples,
            }
            for entry in scores.tasks
        },
    }


def normalize(text: str) -> str:
    """Fold case and space, and drop punctuation at the end."""
    return " ".join(text.lower().split()).rstrip(".,;:!? ")


def overlap(prediction: str, answer: str) -> float:
    """Intersection over union of two boxes of cells 'x0 y0 x1 y1', both ends included."""
    boxes = [_parse_box(text) for text in (prediction, answer)]
    if boxes[0] is None or boxes[1] is None:
        return 0.0
    first, second = boxes[0], boxes[1]
    wide = min(first[2], second[2]) - max(first[0], second[0]) + 1
    high = min(first[3], second[3]) - max(first[1], second[1]) + 1
    if wide <= 0 or high <= 0:
        return 0.0
    shared = wide * high
    return shared / (_area(first) + _area(second) - shared)


def fact_f1(prediction: str, answer: str) -> float:
    """F1 of the facts that two descriptions state."""
    given, true = facts(prediction), facts(answer)
    if not given or not true:
        return float(given == true)
    return 2 * len(given & true) / (len(given) + len(true))


def facts(text: str) -> set[Fact]:
    """What a description states: looks, sizes and places of objects, and the sign's text."""
    found: set[Fact] = set()
    for match in _OBJECT.finditer(text.lower()):
        size, colour, shape, region = (
            match["size"],
            match["colour"],
            match["shape"],
            match["region"],
        )
        found.add((colour, shape))
        if size:
            found.add((colour, shape, size))
        if region:
            found.add((colour, shape, region))
    for match in _SIGN.finditer(text):
        found.add(("sign", match["text"].upper()))
        if match["region"]:
            found.add(("sign", "at", match["region"].lower()))
    return found


def wilson_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of successes."""
    count = len(values)
    share = sum(values) / count
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    reach = share * (1 - share) / count + _Z**2 / (4 * count**2)
    half = _Z * math.sqrt(reach) / (1 + _Z**2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def normal_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % normal interval of a mean of values between 0 and 1."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return 0.0, 1.0
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = _Z * math.sqrt(variance / count)
    return max(0.0, mean - half), min(1.0, mean + half)


def _parse_box(text: str) -> tuple[int, int, int, int] | None:
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if len(numbers) != 4 or numbers[2] < numbers[0] or numbers[3] < numbers[1]:
        return None
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0] + 1) * (box[3] - box[1] + 1)


def _any(words: Sequence[str]) -> str:
    """A pattern for one of the words, longer ones first."""
    return "|".join(sorted(words, key=len, reverse=True))


_PLACE = rf"(?: (?:at|in) the (?P<region>{_any(REGIONS)}))?"
_OBJECT = re.compile(
    rf"\b(?:(?P<size>{_any(SIZES)}) )?(?P<colour>{_any(COLOURS)}) (?P<shape>{_any(SHAPES)})\b"
    rf"{_PLACE}"
)
_SIGN = re.compile(rf'\bsign{_PLACE} that says "(?P<text>[A-Z0-9]+)"', re.IGNORECASE)
