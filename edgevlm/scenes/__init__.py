"""Drawn scenes with known facts: data to calibrate on, to evaluate with, and to train on."""

from __future__ import annotations

from edgevlm.scenes.draw import draw_scene
from edgevlm.scenes.folder import folder_samples
from edgevlm.scenes.sample import Sample, scenes_samples
from edgevlm.scenes.scene import SPLITS, Scene, make_scene
from edgevlm.scenes.score import Scores, TaskScore, score, scores_json, summarize
from edgevlm.scenes.words import EXACT_TASKS, GRADED_TASKS, TASKS

__all__ = [
    "EXACT_TASKS",
    "GRADED_TASKS",
    "SPLITS",
    "TASKS",
    "Sample",
    "Scene",
    "Scores",
    "TaskScore",
    "draw_scene",
    "folder_samples",
    "make_scene",
    "scenes_samples",
    "score",
    "scores_json",
    "summarize",
]
