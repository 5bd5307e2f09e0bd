"""Reads samples from a user's own folder: pictures and one `samples.jsonl`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from edgevlm.errors import RecipeError
from edgevlm.scenes.sample import Sample, conversation

FOLDER_FILE = "samples.jsonl"
_KEYS = ("answer", "answers", "image", "images", "question", "task")
_LINE_HINT = 'each line is like {"image": "a.png", "question": "What is this?", "answer": "a cat"}'


def folder_samples(path: Path) -> list[Sample]:
    """Read every line of a folder's `samples.jsonl`, or of a `.jsonl` file beside its pictures.

    A line has `image` or `images`, `question`, `answer` or `answers`, and may name a `task`.
    Pictures are named relative to the file and must lie in its folder.
    """
    file = path / FOLDER_FILE if path.is_dir() else path
    if not file.is_file():
        raise RecipeError("no such file", hint=f"name a folder with a {FOLDER_FILE}", path=file)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"byte {error.start} is not UTF-8", hint="save the file as UTF-8", path=file
        ) from None
    samples = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            samples.append(_read_line(line, _Place(file, number)))
    if not samples:
        raise RecipeError("there are no samples", hint=_LINE_HINT, path=file)
    return samples


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a line is, for error messages."""

    file: Path
    line: int

    def error(self, message: str, hint: str = _LINE_HINT) -> RecipeError:
        return RecipeError(message, hint=hint, path=self.file, line=self.line)


def _read_line(line: str, place: _Place) -> Sample:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"not JSON, {error.msg.lower()}",
            hint=_LINE_HINT,
            path=place.file,
            line=place.line,
            column=error.colno,
        ) from error
    if not isinstance(entry, dict):
        raise place.error(f"expected an object, got {type(entry).__name__}")
    for key in entry:
        if key not in _KEYS:
            raise place.error(f"{key!r} is not a key", hint=f"keys are {', '.join(_KEYS)}")
    names = _one_or_many(entry, "image", "images", place)
    answers = _one_or_many(entry, "answer", "answers", place)
    question = entry.get("question")
    if question is None:
        raise place.error("'question' is missing")
    if not isinstance(question, str) or not question.strip():
        raise place.error("'question' is not a text")
    task = entry.get("task", "answer")
    if not isinstance(task, str):
        raise place.error("'task' is not a text")
    return Sample(
        images=tuple(_read_image(name, place) for name in names),
        messages=tuple(conversation(len(names), [], question)),
        answers=tuple(answers),
        task=task,
    )


def _one_or_many(entry: dict[str, Any], one: str, many: str, place: _Place) -> list[str]:
    """The texts under a key or its plural; exactly one of the two must be there."""
    if one in entry and many in entry:
        raise place.error(f"both {one!r} and {many!r} are given", hint=f"keep {many!r}")
    if one not in entry and many not in entry:
        raise place.error(f"{one!r} is missing")
    values = [entry[one]] if one in entry else entry[many]
    if not isinstance(values, list) or not values:
        raise place.error(f"{many!r} is not a list of texts")
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise place.error(f"{value!r} is not a text")
    return values


def _read_image(name: str, place: _Place) -> Image.Image:
    folder = place.file.parent
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise place.error(f"image {name!r} is outside the folder", hint="copy it into the folder")
    if not file.is_file():
        raise place.error(f"image {name!r} is missing", hint="name it relative to the file")
    try:
        with Image.open(file) as image:
            rgb: Image.Image = image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise place.error(f"image {name!r} cannot be read", hint="use PNG, JPEG or WebP") from error
    return rgb
