"""The tokenizer: one token a word, exact round trips, a template that places pictures."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from edgevlm.scenes import TASKS, make_scene
from edgevlm.scenes.ask import ask
from edgevlm.scenes.tokens import NUM_RESERVED, build_tokenizer, lexicon
from edgevlm.scenes.words import SIGN_CHARACTERS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_every_word_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    for word in lexicon():
        assert len(tokenizer(word)["input_ids"]) == 1, word
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word
    assert {str(number) for number in range(32)} <= set(lexicon())


def test_sign_text_is_one_token_a_character(tokenizer: PreTrainedTokenizerFast) -> None:
    for character in SIGN_CHARACTERS:
        assert len(tokenizer(character)["input_ids"]) == 1
    for seed in range(400):
        sign = make_scene(seed).sign
        if sign is not None:
            assert len(tokenizer(sign.text)["input_ids"]) == len(sign.text)


def test_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    texts = ["Grüße, 世界!  two  spaces\n", 'The picture shows "K7".']
    for seed in range(100):
        for task in TASKS:
            question = ask(make_scene(seed), task, rng)
            if question is not None:
                texts += [question.text, question.answer]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_description_length(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    lengths = []
    for seed in range(300):
        question = ask(make_scene(seed), "describe", rng)
        assert question is not None
        lengths.append(len(tokenizer(question.answer)["input_ids"]))
    assert min(lengths) >= 14
    assert max(lengths) <= 60


def test_reserved_rows_are_last(tokenizer: PreTrainedTokenizerFast) -> None:
    names = [f"<|reserved_{number}|>" for number in range(NUM_RESERVED)]
    first = len(tokenizer) - NUM_RESERVED
    assert tokenizer.convert_tokens_to_ids(names) == list(range(first, len(tokenizer)))


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Read the sign."}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "K7"}]},
        {"role": "user", "content": "Is there a star?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|user|><image>Read the sign.<|assistant|>K7<|end|><|user|>Is there a star?<|assistant|>"
    )


def test_build_is_repeatable(tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
