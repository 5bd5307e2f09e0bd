"""Which rows of a prompt weigh how much, and where its picture groups begin."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from edgevlm_runtime.image import ImageLayout
from edgevlm_runtime.row_weights import row_weights
from edgevlm_runtime.text import TextSpec, TileMarks, encode_prompt
from tests.runtime.templates import SCENES, SMOLVLM, byte_level

TOKENIZER = byte_level()
PICTURE = TOKENIZER.token_to_id("<image>")


def spec(template: str = SCENES, silent: Sequence[str] = (), **fields: TileMarks) -> TextSpec:
    return TextSpec(
        chat_template=template,
        special={},
        image_token="<image>",
        image_token_id=PICTURE,
        silent_tokens=tuple(TOKENIZER.token_to_id(token) for token in silent),
        **fields,
    )


@pytest.mark.parametrize(
    ("visual", "silent", "text", "question", "words"),
    [
        # two groups of two rows; tokens 10, 11, ... by row
        ([2, 3, 5, 6], (), "1100100111", "0000000111", "0000000111"),
        ([2, 3, 5, 6], (17, 19, 14), "1100100111", "0000000111", "0000000010"),
        ([2, 3, 5, 6], (17, 18, 19), "1100100111", "0000000111", "0000000111"),
        ([], (13,), "1111111111", "1111111111", "1110111111"),
        ([0], (11,), "0111111111", "0111111111", "0011111111"),
        ([8, 9], (10,), "1111111100", "0000000000", "0000000000"),
    ],
)
def test_kinds_of_weights(
    visual: list[int], silent: tuple[int, ...], text: str, question: str, words: str
) -> None:
    weights = row_weights(np.arange(10, 20), np.array(visual, np.int64), silent)
    assert list(weights) == ["text", "question", "words"]
    for kind, wanted in (("text", text), ("question", question), ("words", words)):
        assert weights[kind].dtype == np.float32
        assert weights[kind].tolist() == [float(weight) for weight in wanted]


def test_a_prompt_says_what_its_rows_weigh() -> None:
    """Tokens of the toy tokenizer are bytes, but for those of the template."""
    layouts = [ImageLayout(tokens=(2,)), ImageLayout(tokens=(3,))]
    encoded = encode_prompt("a?b", layouts, spec(silent=("<|assistant|>", "?")), TOKENIZER)
    named = [TOKENIZER.id_to_token(token) for token in encoded.token_ids]
    assert named == ["<|user|>", *["<image>"] * 5, "a", "?", "b", "<|assistant|>"]
    assert encoded.picture_rows.dtype == np.int64
    assert encoded.picture_rows.tolist() == [1, 3]
    assert {kind: weights.tolist() for kind, weights in encoded.row_weights.items()} == {
        "text": [1, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        "question": [0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        "words": [0, 0, 0, 0, 0, 0, 1, 0, 1, 0],
    }


def test_every_tile_is_a_picture_group() -> None:
    layouts = [ImageLayout(tokens=(3,) * 3, tiles=(1, 2)), ImageLayout(tokens=(2,))]
    encoded = encode_prompt("a", layouts, spec(SMOLVLM, tile_marks=TileMarks()), TOKENIZER)
    is_visual = encoded.token_ids == PICTURE
    begins = np.flatnonzero(is_visual & ~np.roll(is_visual, 1))
    assert encoded.picture_rows.tolist() == begins.tolist()
    assert len(begins) == 4
    assert encoded.image_rows.tolist() == np.flatnonzero(is_visual).tolist()


def test_a_prompt_without_pictures_has_no_groups() -> None:
    encoded = encode_prompt("a", (), spec(), TOKENIZER)
    assert (encoded.picture_rows.dtype, encoded.picture_rows.shape) == (np.int64, (0,))
    assert [weights.tolist() for weights in encoded.row_weights.values()] == [[1, 1, 1]] * 3


def test_silent_tokens_survive_json() -> None:
    one = spec(silent=("?", "a"))
    assert TextSpec.from_json(json.loads(json.dumps(one.to_json()))) == one
    before = {key: value for key, value in one.to_json().items() if key != "silent_tokens"}
    assert TextSpec.from_json(before).silent_tokens == ()
