"""A user's folder: what is read, and every complaint in full."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from edgevlm.errors import RecipeError
from edgevlm.scenes import folder_samples

LINE_HINT = 'each line is like {"image": "a.png", "question": "What is this?", "answer": "a cat"}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    Image.new("L", (4, 4), 9).save(tmp_path / "sub" / "b.png")
    return tmp_path


def _write(folder: Path, *lines: str) -> Path:
    file = folder / "samples.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_reads_samples(folder: Path) -> None:
    file = _write(
        folder,
        '{"image": "a.png", "question": "What?", "answer": "a cat"}',
        "",
        '{"images": ["a.png", "sub/b.png"], "question": "Both?", "answers": ["x", "y"],'
        ' "task": "compare"}',
    )
    first, second = folder_samples(folder)
    assert first.images[0].getpixel((0, 0)) == (1, 2, 3)
    assert (first.answers, first.task) == (("a cat",), "answer")
    assert first.messages == (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    )
    assert [image.size for image in second.images] == [(8, 6), (4, 4)]
    assert second.images[1].mode == "RGB"
    assert (second.answers, second.task) == (("x", "y"), "compare")
    assert [part["type"] for part in second.messages[0]["content"]] == ["image", "image", "text"]
    assert [sample.task for sample in folder_samples(file)] == ["answer", "compare"]


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ('{"image": "a.png",', ":1:19: not JSON, expecting property name enclosed in double quotes",
         LINE_HINT),
        ("[1]", ":1: expected an object, got list", LINE_HINT),
        ('{"question": "q", "answer": "a"}', ":1: 'image' is missing", LINE_HINT),
        ('{"image": "a.png", "answer": "a"}', ":1: 'question' is missing", LINE_HINT),
        ('{"image": "a.png", "question": "q"}', ":1: 'answer' is missing", LINE_HINT),
        ('{"image": "a.png", "question": " ", "answer": "a"}', ":1: 'question' is not a text",
         LINE_HINT),
        ('{"image": "a.png", "question": "q", "answer": 3}', ":1: 3 is not a text", LINE_HINT),
        ('{"image": "a.png", "question": "q", "answers": []}',
         ":1: 'answers' is not a list of texts", LINE_HINT),
        ('{"image": "a.png", "images": ["a.png"], "question": "q", "answer": "a"}',
         ":1: both 'image' and 'images' are given", "keep 'images'"),
        ('{"image": "a.png", "question": "q", "answer": "a", "task": 1}',
         ":1: 'task' is not a text", LINE_HINT),
        ('{"image": "a.png", "questoin": "q", "answer": "a"}', ":1: 'questoin' is not a key",
         "keys are answer, answers, image, images, question, task"),
        ('{"image": "c.png", "question": "q", "answer": "a"}', ":1: image 'c.png' is missing",
         "name it relative to the file"),
        ('{"image": "../a.png", "question": "q", "answer": "a"}',
         ":1: image '../a.png' is outside the folder", "copy it into the folder"),
        ('{"image": "samples.jsonl", "question": "q", "answer": "a"}',
         ":1: image 'samples.jsonl' cannot be read", "use PNG, JPEG or WebP"),
    ],
)  # fmt: skip
def test_complaints(folder: Path, line: str, message: str, hint: str) -> None:
    file = _write(folder, line)
    with pytest.raises(RecipeError) as caught:
        folder_samples(folder)
    assert str(caught.value) == f"{file}{message}\n  hint: {hint}"


def test_link_out_of_the_folder(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "link.png").symlink_to(folder / "a.png")
    file = _write(inner, '{"image": "link.png", "question": "q", "answer": "a"}')
    with pytest.raises(RecipeError) as caught:
        folder_samples(inner)
    assert str(caught.value) == (
        f"{file}:1: image 'link.png' is outside the folder\n  hint: copy it into the folder"
    )


def test_nothing_to_read(folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        folder_samples(folder)
    file = folder / "samples.jsonl"
    assert str(caught.value) == f"{file}: no such file\n  hint: name a folder with a samples.jsonl"
    _write(folder, "", "  ")
    with pytest.raises(RecipeError) as caught:
        folder_samples(folder)
    assert str(caught.value) == f"{file}: there are no samples\n  hint: {LINE_HINT}"


def test_text_of_another_encoding(folder: Path) -> None:
    (folder / "samples.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(RecipeError) as caught:
        folder_samples(folder)
    assert str(caught.value) == (
        f"{folder / 'samples.jsonl'}: byte 0 is not UTF-8\n  hint: save the file as UTF-8"
    )


def test_second_line_is_named(folder: Path) -> None:
    good = '{"image": "a.png", "question": "What?", "answer": "a cat"}'
    file = _write(folder, good, "", '{"image": "c.png", "question": "q", "answer": "a"}')
    with pytest.raises(RecipeError) as caught:
        folder_samples(folder)
    assert str(caught.value).startswith(f"{file}:3: image 'c.png' is missing")
