"""Samples for evidence and evaluation: the built-in picture world, or a user's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgevlm.scenes import Sample, folder_samples, scenes_samples, score, scores_json, summarize
from edgevlm_runtime.images.geometry import nearest_grid, smart_grid
from edgevlm_runtime.images.spec import Geometry, NativeGeometry

__all__ = ["Sample", "content_of", "cover_grids", "draw_samples", "score_answers"]


def draw_samples(folder: Path | None, *, split: str, count: int, seed: int) -> list[Sample]:
    """Return the first `count` samples of a folder, or as many scenes of a split, by their seed."""
    if folder is not None:
        return folder_samples(folder)[:count]
    return scenes_samples(split, count, seed)


def cover_grids(samples: Sequence[Sample], geometry: Geometry) -> list[Sample]:
    """The samples, and one more for each vision grid that none of their pictures takes.

    That one is a sample of few pictures, stretched to the size of the grid: every vision graph is
    exercised, whatever shapes the samples have.
    """
    covered = list(samples)
    if not isinstance(geometry, NativeGeometry):
        return covered
    taken = {
        nearest_grid(smart_grid(image.height, image.width, geometry), geometry)
        for sample in samples
        for image in sample.images
    }
    plain = min(samples, key=lambda sample: len(sample.images))
    for height, width in geometry.grids:
        if (height, width) not in taken:
            size = (width * geometry.patch, height * geometry.patch)
            stretched = tuple(image.resize(size) for image in plain.images)
            covered.append(replace(plain, images=stretched))
    return covered


def content_of(sample: Sample) -> tuple[object, ...]:
    """All that a sample is made of, for a hash."""
    pictures = [(image.size, image.mode, image.tobytes()) for image in sample.images]
    return pictures, sample.messages, sample.answers, sample.task


def score_answers(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """Task accuracy of answers, as `{mean_accuracy, tasks: {name: {accuracy, low, high, n}}}`."""
    return scores_json(
        summarize(
            (sample.task, score(sample.task, answer, sample))
            for sample, answer in zip(samples, answers, strict=True)
        )
    )
