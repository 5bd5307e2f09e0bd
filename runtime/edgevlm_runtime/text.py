"""Messages in, a prompt of token ids, image rows and positions out, by the bundle's `TextSpec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgevlm_runtime.images.spec import ImageLayout

Message = Mapping[str, Any]
Messages = str | Sequence[Message]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSpec:
    """How messages become token ids.

    `chat_template` is Jinja text. `special` are the names the template may use (`bos_token`, ...).
    `image_token` is what the template writes for a picture and what stands once per visual token;
    `expansion` says what else is written around them: `plain` nothing, `tiled` the row, column and
    global marks of Idefics3. `positions` is `sequential` or `mrope` (three numbers per row).
    """

    chat_template: str
    special: Mapping[str, str]
    image_token: str
    image_token_id: int
    expansion: str = "plain"
    positions: str = "sequential"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextSpec:
        """Read the manifest's `text`; an unknown key, a wrong type or a wrong value is an error."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """A prompt ready for prefill. T rows, V of them visual.

    `image_rows` [V] are the rows where visual features go, in the order of the vision graph's
    calls and tokens; `token_ids` [T] holds the image token there. `positions` is int64 [T], or
    [3, T] (temporal, height, width) for M-RoPE. `next_position` is that of the first new token.
    """

    token_ids: NDArray[np.int64]
    image_rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    next_position: int


def load_tokenizer(data: bytes) -> Tokenizer:
    """Read the bytes of `tokenizer.json`, with padding and truncation off."""
    raise NotImplementedError


def user_message(prompt: str, num_images: int) -> list[Message]:
    """One user message: the pictures first, then the text."""
    raise NotImplementedError


def render(messages: Messages, spec: TextSpec, *, add_generation_prompt: bool = True) -> str:
    """The chat template's text for these messages, one image token per picture."""
    raise NotImplementedError


def encode_prompt(
    messages: Messages, layouts: Sequence[ImageLayout], spec: TextSpec, tokenizer: Tokenizer
) -> EncodedPrompt:
    """Render, expand every picture to its tokens, tokenize, and give each row its position.

    A plain string is one user message with all pictures before it.
    """
    raise NotImplementedError
