"""Messages in, a prompt of token ids, image rows and positions out, by the bundle's `TextSpec`.

Ordinary text becomes the same tokens as with transformers. Control tokens (special tokens, and
added tokens that the chat template writes) in a user's text are refused, where transformers obeys
them: a prompt assembled from what a robot heard or read must not be able to end its own turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgevlm_runtime import structure
from edgevlm_runtime.chat import (
    Message,
    Messages,
    check_control_tokens,
    check_messages,
    num_image_parts,
    render_messages,
    texts,
    user_message,
)
from edgevlm_runtime.errors import BundleError, InputError
from edgevlm_runtime.images.spec import ImageLayout
from edgevlm_runtime.positions import AXES, Positions, placed_positions
from edgevlm_runtime.row_weights import row_weights

__all__ = [
    "EncodedPrompt",
    "Message",
    "Messages",
    "TextSpec",
    "TileMarks",
    "encode_prompt",
    "load_tokenizer",
    "render",
    "user_message",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class TileMarks:
    """What is written around the tiles of a picture (Idefics3, SmolVLM).

    `around` opens every tile and closes the picture, `tile` (with fields `row` and `column`, from
    1) and `whole` name what follows.
    """

    around: str = "<fake_token_around_image>"
    tile: str = "<row_{row}_col_{column}>"
    whole: str = "<global-img>"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSpec:
    """How messages become token ids.

    `chat_template` is Jinja text. `special` are the names the template may use (`bos_token`, ...).
    `image_token` is what the template writes for a picture and what stands once per visual token;
    `tile_marks` says what else is written around the tiles of one, None nothing. `positions` is
    `sequential` or `mrope` (three numbers tell rows apart). `silent_tokens` are those that say
    nothing about what is asked: punctuation, filler words, what the template writes.
    """

    chat_template: str
    special: Mapping[str, str]
    image_token: str
    image_token_id: int
    tile_marks: TileMarks | None = None
    positions: str = "sequential"
    silent_tokens: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        data: dict[str, Any] = structure.to_json(self)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextSpec:
        """Read the manifest's `text`; what is unknown, missing or wrong is a `BundleError`."""
        spec = structure.from_json(cls, data, "manifest.json: text")
        problem = None
        if spec.positions not in AXES:
            known = " or ".join(repr(name) for name in AXES)
            problem = f"positions: expected {known}, got {spec.positions!r}"
        elif not spec.image_token:
            problem = "image_token: it is empty"
        if problem is not None:
            raise BundleError(
                f"manifest.json: text.{problem}",
                hint="compile the bundle again, a manifest is not edited by hand",
            )
        return spec


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """A prompt ready for prefill. T rows, V of them visual, in P picture groups.

    `image_rows` [V] are the rows where visual features go, in the order of the vision graph's
    calls and tokens; `token_ids` [T] holds the image token there. `picture_rows` [P] are those of
    them where a call's tokens begin. `positions` is [T], or [A, T] for A axes (temporal, height and
    width for M-RoPE), int64 or for fractions float64; a graph may have the last word on those of
    visual tokens. `next_position` is that of the first new token.
    `row_weights` has float32 [T] for each kind of weights.
    """

    token_ids: NDArray[np.int64]
    image_rows: NDArray[np.int64]
    positions: Positions
    next_position: float
    picture_rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    row_weights: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def load_tokenizer(data: bytes) -> Tokenizer:
    """Read the bytes of `tokenizer.json`, with padding and truncation off."""
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # tokenizers raises nothing narrower
        raise BundleError(f"tokenizer.json cannot be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def render(messages: Messages, spec: TextSpec, *, add_generation_prompt: bool = True) -> str:
    """The chat template's text for these messages, one image token per picture."""
    if isinstance(messages, str):
        messages = user_message(messages, 0)
    check_messages(messages)
    return render_messages(
        messages, spec.chat_template, spec.special, add_generation_prompt=add_generation_prompt
    )


def encode_prompt(
    messages: Messages,
    layouts: Sequence[ImageLayout],
    spec: TextSpec,
    tokenizer: Tokenizer,
    num_axes: int | None = None,
) -> EncodedPrompt:
    """Render, expand every picture to its tokens, tokenize, and give each row its position.

    A plain string is one user message with all pictures before it. `num_axes` are those of the
    rotary embedding, where it turns with more than the rule of the positions tells apart.
    """
    if isinstance(messages, str):
        messages = user_message(messages, len(layouts))
    check_messages(messages)
    _check_placeholders(messages, len(layouts), spec)
    check_control_tokens(messages, _control_tokens(tokenizer, spec))
    text = _expanded(render(messages, spec), layouts, spec)
    # A template that writes the first token itself must not get it twice.
    bos = spec.special.get("bos_token")
    written = bos is not None and text.startswith(bos)
    token_ids = np.array(tokenizer.encode(text, add_special_tokens=not written).ids, np.int64)

    image_rows = np.flatnonzero(token_ids == spec.image_token_id)
    num_tokens = sum(layout.num_tokens for layout in layouts)
    if len(image_rows) != num_tokens:
        raise BundleError(
            f"the tokenizer made {len(image_rows)} image tokens of {num_tokens} visual tokens",
            hint=f"check that {spec.image_token!r} has id {spec.image_token_id} in tokenizer.json",
        )
    positions, next_position = placed_positions(
        len(token_ids), image_rows, layouts, spec.positions, num_axes=num_axes
    )
    counts = [count for layout in layouts for count in layout.tokens]
    return EncodedPrompt(
        token_ids=token_ids,
        image_rows=image_rows,
        positions=positions,
        next_position=next_position,
        picture_rows=image_rows[np.cumsum([0, *counts], dtype=np.int64)[:-1]],
        row_weights=row_weights(token_ids, image_rows, spec.silent_tokens),
    )


def _check_placeholders(messages: Sequence[Message], num_images: int, spec: TextSpec) -> None:
    """Every picture is placed once: by a part, and not by writing the image token."""
    placed = num_image_parts(messages)
    typed = sum(text.count(spec.image_token) for message in messages for text in texts(message))
    if placed + typed != num_images:
        raise InputError(
            f"prompt has {_counted(placed + typed, 'image placeholder')} "
            f"for {_counted(num_images, 'picture')}",
            hint=f"place every picture once as {{'type': 'image'}}, never as {spec.image_token!r}"
            if typed
            else "place every picture once as {'type': 'image'}",
        )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _control_tokens(tokenizer: Tokenizer, spec: TextSpec) -> list[str]:
    added = tokenizer.get_added_tokens_decoder().values()
    return [
        token.content
        for token in added
        if not token.content.isspace() and (token.special or token.content in spec.chat_template)
    ]


def _expanded(rendered: str, layouts: Sequence[ImageLayout], spec: TextSpec) -> str:
    """The text with every placeholder replaced by what its picture becomes."""
    pieces = rendered.split(spec.image_token)
    if len(pieces) - 1 != len(layouts):
        raise InputError(
            f"the chat template wrote {_counted(len(pieces) - 1, 'image placeholder')} "
            f"for {_counted(len(layouts), 'picture')}",
            hint="place pictures in user messages",
        )
    text = pieces[0]
    for layout, piece in zip(layouts, pieces[1:], strict=True):
        text += _picture_text(layout, spec) + piece
    return text


def _picture_text(layout: ImageLayout, spec: TextSpec) -> str:
    marks, image = spec.tile_marks, spec.image_token
    if marks is None:
        return image * layout.num_tokens
    rows, columns = layout.tiles
    tokens = iter(layout.tokens)
    text = ""
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            mark = marks.tile.format(row=row, column=column)
            text += marks.around + mark + image * next(tokens)
        text += "\n"
    if rows:
        text += "\n"
    return text + marks.around + marks.whole + image * next(tokens) + marks.around
