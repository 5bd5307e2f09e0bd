"""Tokens that say nothing: of small tokenizers of each kind, and who fills them into a bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgevlm.asked import Asked
from edgevlm.checkpoint import open_checkpoint
from edgevlm.families.silent import silent_tokens, stop_words
from edgevlm.families.text_spec import tokenizer_json
from edgevlm.model.spec import VlmSpec
from edgevlm.recipe import load_recipe
from edgevlm_runtime.image import ImageLayout
from edgevlm_runtime.row_weights import row_weights
from edgevlm_runtime.text import TextSpec, encode_prompt
from tests.edgevlm.reduce.placing import foreseen
from tests.runtime.templates import LLAVA, QWEN, SCENES

SPECIAL = ["<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = ["the", "The", "THE", "cup", "Cup", "red", "user", "assistant", "helpful", "is", "us", "US"]
MARKS = [".", "?", "...", "?\n", " ", "\n", "\n\n", "(", "-", "$", "…", "。", "«", "°", "é", "3"]


def byte_level() -> Tokenizer:
    """Whole words, with and without the space in front, beside single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = {
        text: pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
        for text in (*WORDS, *MARKS, *(f" {word}" for word in WORDS))
    }
    tokens = ["".join(piece for piece, _ in pieces) for pieces in spelled.values()]
    known = dict.fromkeys([*alphabet, *tokens])
    vocabulary = {token: number for number, token in enumerate(known)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def metaspace() -> Tokenizer:
    """The same as sentencepiece has it: a space is the mark that words begin with."""
    tokens = ["<unk>", "▁", *MARKS, *WORDS, *(f"▁{word}" for word in WORDS)]
    tokens += ["A", "S", "I", "T", "N", "U", "E", "R", ":", "▁U", "▁A"]
    scores = [(token, -float(number)) for number, token in enumerate(dict.fromkeys(tokens))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def text_of(tokenizer: Tokenizer, template: str = SCENES, image: str = "<image>") -> TextSpec:
    return TextSpec(
        chat_template=template,
        special={},
        image_token=image,
        image_token_id=tokenizer.token_to_id(image),
    )


def named(tokenizer: Tokenizer, ids: tuple[int, ...]) -> set[str]:
    assert list(ids) == sorted(set(ids))
    return {tokenizer.id_to_token(token) for token in ids}


@pytest.mark.parametrize(("make", "space"), [(byte_level, "Ġ"), (metaspace, "▁")])
def test_function_words_with_and_without_space_and_capitalised(make: Any, space: str) -> None:
    tokenizer = make()
    found = named(tokenizer, silent_tokens(tokenizer, text_of(tokenizer)))
    for word in ("the", "The", "is", "us"):
        assert {word, f"{space}{word}"} <= found
    for word in ("cup", "Cup", "red", "US", "THE", "helpful", "user", "assistant"):
        assert not {word, f"{space}{word}"} & found
    assert set(SPECIAL) <= found


def test_punctuation_and_white_space_alone() -> None:
    """Of bytes none that is a letter, a digit, a sign with a meaning, or half a character."""
    tokenizer = byte_level()
    found = named(tokenizer, silent_tokens(tokenizer, text_of(tokenizer)))
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def token(text: str) -> str:
        return "".join(piece for piece, _ in spelled.pre_tokenize_str(text))

    for text in (".", "?", "...", "?\n", " ", "\n", "\n\n", "(", "-", "$", "…", "。", "«"):
        assert token(text) in found, text
    for text in ("°", "é", "3"):
        assert token(text) not in found, text
    # 0xE2 is the beginning of a character.
    assert "â" not in found
    assert {"x", "Q", "7"}.isdisjoint(found)


def test_a_mark_that_is_a_space_alone() -> None:
    tokenizer = metaspace()
    assert "▁" in named(tokenizer, silent_tokens(tokenizer, text_of(tokenizer)))


def test_what_the_template_writes_around_a_text() -> None:
    """The names of who speaks, from the picture on; not the system's own words in front of it."""
    tokenizer = byte_level()
    spec = text_of(tokenizer, QWEN, "<|image_pad|>")
    found = named(tokenizer, silent_tokens(tokenizer, spec))
    plain = named(tokenizer, silent_tokens(tokenizer, text_of(tokenizer)))
    assert found - plain == {"user", "assistant"}
    assert "helpful" not in found


def test_a_template_of_one_turn() -> None:
    tokenizer = byte_level()
    template = (
        "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
        + QWEN.replace("<|image_pad|>", "<image>")
    )
    found = named(tokenizer, silent_tokens(tokenizer, text_of(tokenizer, template)))
    # The user's name stands before the picture, and there is no second turn.
    assert "assistant" in found
    assert "user" not in found


def test_a_template_that_writes_words_in_pieces() -> None:
    tokenizer = metaspace()
    found = named(tokenizer, silent_tokens(tokenizer, text_of(tokenizer, LLAVA)))
    for token in ("▁A", "S", "I", "T", "A", "N", ":", "E", "R"):
        assert token in found
    assert "▁cup" not in found


def test_a_question_is_about_its_words() -> None:
    tokenizer = byte_level()
    spec = text_of(tokenizer, QWEN, "<|image_pad|>")
    spec = replace(spec, silent_tokens=silent_tokens(tokenizer, spec))
    prompt = encode_prompt("is the cup red?", [ImageLayout(tokens=(2,))], spec, tokenizer)
    words = prompt.row_weights["words"] > 0
    assert [tokenizer.id_to_token(token) for token in prompt.token_ids[words]] == ["Ġcup", "Ġred"]
    assert (row_weights(prompt.token_ids, prompt.image_rows, ())["words"] > 0).sum() > 6


def test_the_words_are_a_list() -> None:
    words = stop_words()
    assert list(words) == sorted(set(words))
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    assert 100 < len(words) < 200
    # Words that a picture can show, or say where something is, are asked about.
    assert {"left", "right", "above", "below", "no", "not", "many"}.isdisjoint(words)


@pytest.fixture(scope="module")
def scenes(root: Path) -> tuple[VlmSpec, bytes, Path]:
    folder = root / "recipes" / "models" / "scenes-vlm"
    spec = open_checkpoint(str(folder)).spec()
    return spec, tokenizer_json(folder, TextSpec.from_json(spec.text)), folder


def asked_of(spec: VlmSpec, tokenizer: bytes, root: Path) -> Asked:
    return Asked(
        recipe=load_recipe(root / "recipes" / "quickstart.yaml"),
        spec=spec,
        tokenizer=tokenizer,
        capacity=512,
        is_drawn=False,
    )


@pytest.mark.parametrize(
    ("options", "asks"),
    [
        ({"method": "mmtok", "keep": 0.5}, True),
        ({"method": "fastv", "keep": 0.5}, False),
        ({"method": "uniform", "keep": 0.5}, False),
        (None, False),
    ],
)
def test_only_who_asks_for_words_is_told(
    scenes: tuple[VlmSpec, bytes, Path], root: Path, options: dict[str, Any] | None, asks: bool
) -> None:
    """No spec knows them: neither a plan nor a pass has the tokenizer."""
    spec, tokenizer, _ = scenes
    after = spec if options is None else foreseen(spec, **options)
    assert after.text == spec.text
    text = asked_of(after, tokenizer, root).text
    if not asks:
        assert text is after.text
        return
    silent = text["silent_tokens"]
    assert {**text, "silent_tokens": spec.text["silent_tokens"]} == spec.text
    assert json.loads(json.dumps(text)) == text
    read = Tokenizer.from_str(tokenizer.decode())
    found = {read.id_to_token(token) for token in silent}
    assert {"Ġthe", "Which", "?", "<|user|>", "<|assistant|>"} <= found
    assert {"Ġred", "Ġleft", "Ġcircle", "circle"}.isdisjoint(found)
