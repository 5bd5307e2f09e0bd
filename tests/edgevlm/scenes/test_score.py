"""Scores: numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from PIL import Image

from edgevlm.scenes import Sample, score, scores_json, summarize
from edgevlm.scenes.score import fact_f1, facts, normal_interval, overlap, wilson_interval


def _sample(*answers: str, task: str = "where") -> Sample:
    return Sample(images=(Image.new("RGB", (1, 1)),), messages=(), answers=answers, task=task)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("top left", 1.0),
        (" Top  LEFT. ", 1.0),
        ("top left!?", 1.0),
        ("top", 0.0),
        ("topleft", 0.0),
        ("", 0.0),
    ],
)
def test_exact_match(prediction: str, expected: float) -> None:
    assert score("where", prediction, _sample("top left")) == expected


def test_any_answer_counts() -> None:
    assert score("answer", "Grey", _sample("gray", "grey")) == 1.0
    assert score("answer", "green", _sample("gray", "grey")) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("2 3 5 6", "2 3 5 6", 1.0),
        # 4 x 4 cells against 4 x 4 moved by one: 12 shared of 20.
        ("3 3 6 6", "2 3 5 6", 12 / 20),
        # Moved by one both ways: 9 shared of 23.
        ("3 4 6 7", "2 3 5 6", 9 / 23),
        ("7 3 9 6", "2 3 5 6", 0.0),
        ("5 6 2 3", "2 3 5 6", 0.0),
        ("2 3 5", "2 3 5 6", 0.0),
        ("2 3 5 6 7", "2 3 5 6", 0.0),
        ("red", "2 3 5 6", 0.0),
    ],
)
def test_overlap(prediction: str, answer: str, expected: float) -> None:
    assert overlap(prediction, answer) == pytest.approx(expected, abs=1e-12)
    assert score("box", prediction, _sample(answer, task="box")) == float(expected >= 0.5)


def test_facts_of_a_description() -> None:
    text = (
        "The picture shows 2 objects: a large red circle in the centre, a small blue star at the "
        'bottom right, a sign at the top that says "K7".'
    )
    assert facts(text) == {
        ("red", "circle"),
        ("red", "circle", "large"),
        ("red", "circle", "centre"),
        ("blue", "star"),
        ("blue", "star", "small"),
        ("blue", "star", "bottom right"),
        ("sign", "K7"),
        ("sign", "at", "top"),
    }


def test_fact_f1() -> None:
    true = "a large red circle in the centre, a small blue star at the top."
    # Right look and size, wrong place: 2 of 3 facts; the star is missing: 3 more.
    given = "a large red circle at the left."
    assert fact_f1(true, true) == 1.0
    assert fact_f1(given, true) == pytest.approx(2 * 2 / (3 + 6), abs=1e-12)
    assert fact_f1("nothing at all", true) == 0.0


def test_wilson_interval() -> None:
    """Against the interval of Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662."""
    low, high = wilson_interval([1.0] * 81 + [0.0] * 182)
    assert low == pytest.approx(0.2553, abs=5e-5)
    assert high == pytest.approx(0.3662, abs=5e-5)
    assert wilson_interval([1.0] * 10)[1] == pytest.approx(1.0, abs=1e-12)


def test_normal_interval() -> None:
    # Mean 0.5, deviation sqrt(1/3), 4 values: half width 1.96 * sqrt(1/3) / 2.
    low, high = normal_interval([0.0, 0.0, 1.0, 1.0])
    half = 1.959963984540054 * math.sqrt(1 / 3) / 2
    assert (low, high) == (max(0.0, 0.5 - half), min(1.0, 0.5 + half))
    assert normal_interval([0.3]) == (0.0, 1.0)


def test_summary() -> None:
    """The mean is over exact-match tasks, each alike; boxes and descriptions stand apart."""
    results = [("exists", 1.0), ("exists", 0.0), ("colour", 1.0), ("box", 0.0), ("describe", 0.25)]
    scores = summarize(results)
    assert scores.mean_accuracy == 0.75
    assert [(entry.task, entry.mean, entry.num_samples) for entry in scores.tasks] == [
        ("exists", 0.5, 2),
        ("colour", 1.0, 1),
        ("box", 0.0, 1),
        ("describe", 0.25, 1),
    ]
    assert summarize([("exists", 1.0), ("zebra", 0.0), ("box", 1.0)]).mean_accuracy == 0.5
    assert summarize([("box", 1.0)]).mean_accuracy is None
    assert [entry.task for entry in summarize([("zebra", 1.0), ("read", 1.0)]).tasks] == [
        "read",
        "zebra",
    ]


def test_scores_as_json() -> None:
    found = scores_json(summarize([("exists", 1.0), ("exists", 0.0)]))
    low, high = wilson_interval([1.0, 0.0])
    assert found == {
        "mean_accuracy": 0.5,
        "tasks": {"exists": {"accuracy": 0.5, "low": low, "high": high, "n": 2}},
    }
