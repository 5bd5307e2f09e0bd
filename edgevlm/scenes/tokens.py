"""The tokenizer: byte-level BPE in which every word of the scenes is one token."""

from __future__ import annotations

import random
import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from edgevlm.scenes.ask import ask, ask_about
from edgevlm.scenes.scene import SPLITS, make_scene
from edgevlm.scenes.words import (
    COLOURS,
    ORDINALS,
    PHRASINGS,
    REGIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    TASKS,
    plural,
)

USER, ASSISTANT, END, PAD, IMAGE = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<image>"
NUM_RESERVED = 16
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_MAX_POSITIONS = 2048


def lexicon() -> list[str]:
    """Every word and number of the scenes' questions and answers."""
    words = {word for name in (*COLOURS, *SHAPES, *SIZES, *ORDINALS, *RELATIONS) for word in [name]}
    words |= {plural(shape) for shape in SHAPES}
    words |= {word for region in REGIONS for word in region.split()}
    words |= {str(number) for number in range(32)}
    # The frames of the sentences, found by asking: phrasings first, then some scenes.
    for phrasings in PHRASINGS.values():
        for phrasing in phrasings:
            lowered = phrasing[0].lower() + phrasing[1:]
            words |= set(_WORD.findall(phrasing.format(a="a", b="b"))) - {"b"}
            words |= set(_WORD.findall(lowered.format(a="a", b="b"))) - {"b"}
    rng = random.Random(0)
    for seed in range(SPLITS["train"].start, SPLITS["train"].start + 300):
        scene = make_scene(seed)
        for task in TASKS:
            question = ask(scene, task, rng)
            if question is None:
                continue
            words |= set(_WORD.findall(ask_about(question, seed % 2).text))
            if task != "read":
                words |= set(_WORD.findall(_QUOTED.sub("", question.answer)))
    return sorted(words)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on the lexicon; the result is the same every time."""
    words = lexicon()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [*words, *(f" {word}" for word in words), ' "', '".', '."']
    tokenizer.train_from_iterator(corpus, trainer)
    specials = [USER, ASSISTANT, END, PAD, IMAGE]
    specials += [f"<|reserved_{number}|>" for number in range(NUM_RESERVED)]
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=_MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token."""
    return tokenizer.get_vocab()[token]


_WORD = re.compile(r"[A-Za-z]+|[0-9]+")
_QUOTED = re.compile(r'"[^"]*"')
