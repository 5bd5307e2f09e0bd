"""Tokens that say nothing about what is asked: a question's other words are what it is about.

They are special and added tokens, punctuation and white space, function words of English, and what
the chat template writes around a user's text.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

from tokenizers import Tokenizer

from edgevlm_runtime.errors import EdgeVlmError
from edgevlm_runtime.text import TextSpec, render

__all__ = ["silent_tokens", "stop_words"]

# What stands for a user's and an assistant's text: words that no template writes.
_TEXTS = ("Zebrafish", "Quokka", "Axolotl")


def silent_tokens(tokenizer: Tokenizer, spec: TextSpec) -> tuple[int, ...]:
    """Their ids, ascending."""
    words = {form for word in stop_words() for form in (word, word.capitalize())}
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    found = set(tokenizer.get_added_tokens_decoder())
    for token, text in zip(ids, _texts(tokenizer, ids), strict=True):
        if _is_mute(text) or text.strip() in words:
            found.add(token)
    return tuple(sorted(found | set(_written(tokenizer, spec))))


def stop_words() -> tuple[str, ...]:
    """Function words of English, in lower case."""
    text = resources.files("edgevlm.families").joinpath("stop_words.txt").read_text("ascii")
    return tuple(text.split())


def _texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token as a text of its own, with the space that it begins with or without."""
    found: list[str] = tokenizer.decode_batch([[token] for token in ids], skip_special_tokens=False)
    return found


def _is_mute(text: str) -> bool:
    """Whether a text is but punctuation and white space; half a character is neither."""
    return all(
        character.isspace()
        or character in string.punctuation
        or unicodedata.category(character).startswith("P")
        for character in text
    )


def _written(tokenizer: Tokenizer, spec: TextSpec) -> Iterator[int]:
    """Tokens that the template writes from the first picture on, around what others say."""
    text = _conversation(spec)
    start = text.find(spec.image_token)
    spans, place = [], max(start, 0)
    for said in _TEXTS:
        begin = text.find(said, place)
        if begin >= 0:
            place = begin + len(said)
            spans.append((begin, place))
    encoded = tokenizer.encode(text, add_special_tokens=False)
    for token, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True):
        is_said = any(begin < other_end and other < end for other, other_end in spans)
        if begin >= start and end > begin and not is_said:
            yield token


def _conversation(spec: TextSpec) -> str:
    """A conversation of two turns as the template writes it, of one where it takes no more."""
    picture = [{"type": "image"}, _part(_TEXTS[0])]
    first: list[dict[str, Any]] = [{"role": "user", "content": picture}]
    more = [
        {"role": "assistant", "content": [_part(_TEXTS[1])]},
        {"role": "user", "content": [_part(_TEXTS[2])]},
    ]
    try:
        return render([*first, *more], spec)
    except EdgeVlmError:
        return render(first, spec)


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
