"""Samples to calibrate on and to evaluate with: the built-in picture world, or a user's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgevlm.scenes import Sample, folder_samples, scenes_samples, score, summarize

__all__ = ["Sample", "draw_samples", "score_answers"]


def draw_samples(folder: Path | None, *, split: str, count: int, seed: int) -> list[Sample]:
    """Return the first `count` samples of a folder, or as many scenes of a split, by their seed."""
    if folder is not None:
        return folder_samples(folder)[:count]
    return scenes_samples(split, count, seed)


def score_answers(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """Task accuracy of answers, as `{mean_accuracy, tasks: {name: {accuracy, low, high, n}}}`."""
    scores = summarize(
        (sample.task, score(sample.task, answer, sample))
        for sample, answer in zip(samples, answers, strict=True)
    )
    return {
        "mean_accuracy": scores.mean_accuracy,
        "tasks": {
            task.task: {
                "accuracy": task.mean,
                "low": task.low,
                "high": task.high,
                "n": task.num_samples,
            }
            for task in scores.tasks
        },
    }
