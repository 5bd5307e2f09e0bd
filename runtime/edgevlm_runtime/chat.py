"""Chat messages: their form, what they may hold, and the text that a template makes of them.

Messages follow Hugging Face: `role` and `content`, which is a text or a list of parts
`{"type": "image"}` and `{"type": "text", "text": ...}`. Pictures are given beside the messages, in
the order of their parts.

The template is Jinja, run by minijinja: no attribute of a Python object can be reached from it, its
steps are counted (fuel) and its output is measured. It renders to what transformers renders.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import minijinja

from edgevlm_runtime.errors import BundleError, InputError

Message = Mapping[str, Any]
Messages = str | Sequence[Message]

ROLES = ("system", "user", "assistant")
MAX_CHARACTERS = 1_000_000
# A message costs a template some hundred steps; a million take about 50 ms.
_FUEL = 1_000_000


def user_message(prompt: str, num_images: int) -> list[Message]:
    """One user message: the pictures first, then the text."""
    if not prompt.strip():
        raise InputError("prompt is empty")
    images = [{"type": "image"} for _ in range(num_images)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": prompt}]}]


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse what a template would read wrongly or not at all; messages count from 1."""
    if not isinstance(messages, Sequence):
        raise InputError(
            f"messages are a {type(messages).__name__}", hint="give a text or a list of messages"
        )
    if not messages:
        raise InputError("prompt is empty")
    for number, message in enumerate(messages, 1):
        _check_message(message, f"message {number}")
    size = sum(len(text) for message in messages for text in texts(message))
    if size > MAX_CHARACTERS:
        raise InputError(f"prompt has {size:,} characters, at most {MAX_CHARACTERS:,} are read")


def texts(message: Message) -> list[str]:
    """The texts of a message, in order."""
    content = message["content"]
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]


def num_image_parts(messages: Iterable[Message]) -> int:
    """How many pictures the messages place."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return sum(part["type"] == "image" for part in parts)


def check_control_tokens(messages: Sequence[Message], tokens: Iterable[str]) -> None:
    """Refuse texts that hold a control token: the tokenizer would obey it, wherever it came from.

    A template may write the texts of one message one after another, so they are also looked at
    together.
    """
    joined = ["\0".join(("".join(texts(m)), *texts(m))) for m in messages]
    for token in tokens:
        for number, text in enumerate(joined, 1):
            if token in text:
                raise InputError(
                    f"text of message {number} holds the control token {token!r}",
                    hint="take it out: the chat template writes control tokens",
                )


def render_messages(
    messages: Sequence[Message],
    template: str,
    special: Mapping[str, str],
    *,
    add_generation_prompt: bool,
) -> str:
    """The template's text, in which every system and user text is known to stand.

    A template made for lists of parts silently skips a content that is a plain text; such contents
    are then given as lists of one part. What a template skips is found by rendering marks in the
    place of the texts.
    """

    def rendered(form: Sequence[Message]) -> str:
        context = {
            **special,
            "messages": form,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return render_template(template, context)

    if _skipped(messages, rendered(_marked(messages))) is not None:
        messages = [_as_parts(message) for message in messages]
        skipped = _skipped(messages, rendered(_marked(messages)))
        if skipped is not None:
            raise InputError(f"the chat template leaves out the text of message {skipped}")
    return rendered(messages)


def render_template(template: str, context: Mapping[str, Any]) -> str:
    """Render as transformers does, within bounds of time and output."""
    environment = minijinja.Environment(
        templates={"chat_template": template},
        globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
        filters={"tojson": _tojson},
        trim_blocks=True,
        lstrip_blocks=True,
        auto_escape_callback=lambda name: False,
        fuel=_FUEL,
    )
    try:
        text = environment.render_template("chat_template", **context)
    except minijinja.TemplateError as error:
        raise BundleError(f"chat template: {error.message.splitlines()[0]}") from error
    if len(text) > 2 * MAX_CHARACTERS:
        raise BundleError(
            f"chat template wrote {len(text):,} characters, at most {2 * MAX_CHARACTERS:,} are read"
        )
    return text


def _check_message(message: Message, name: str) -> None:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise InputError(f"{name} is {_shape(message)}, expected a dict with 'role' and 'content'")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise InputError(f"{name} has role {role!r}, expected one of {', '.join(map(repr, ROLES))}")
    if isinstance(content, str):
        empty = not content.strip()
    elif isinstance(content, (list, tuple)):
        for number, part in enumerate(content, 1):
            _check_part(part, f"part {number} of {name}")
        empty = not any(part["type"] == "image" or part["text"].strip() for part in content)
    else:
        raise InputError(
            f"content of {name} is a {type(content).__name__}, expected a text or a list of parts"
        )
    if empty:
        raise InputError(f"{name} is empty")


def _check_part(part: Any, name: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image" and set(part) != {"type"}:
        raise InputError(
            f"{name} carries {', '.join(repr(key) for key in part if key != 'type')}",
            hint="write {'type': 'image'} and give the pictures beside the messages",
        )
    if kind == "text" and (set(part) != {"type", "text"} or not isinstance(part["text"], str)):
        raise InputError(f"{name} is {_shape(part)}, expected {{'type': 'text', 'text': ...}}")
    if kind not in ("image", "text"):
        raise InputError(
            f"{name} is {_shape(part)}, expected {{'type': 'image'}} or "
            "{'type': 'text', 'text': ...}"
        )


def _shape(value: Any) -> str:
    """A short account of a value that is not what it should be."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_short(value[key])}" for key in list(value)[:6]) + "}"
    return f"a {type(value).__name__}"


def _short(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, (str, int, float)) else "..."


def _marked(messages: Sequence[Message]) -> list[Message]:
    """The messages with each text replaced by a mark of its message."""
    return [
        {**message, "content": _mark(number)}
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [
                {**part, "text": _mark(number)} if part["type"] == "text" else part
                for part in message["content"]
            ],
        }
        for number, message in enumerate(messages, 1)
    ]


def _mark(number: int) -> str:
    return f"\x02{number}\x03"


def _skipped(messages: Sequence[Message], rendered: str) -> int | None:
    """The first system or user message whose mark does not stand once per text."""
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant" and rendered.count(_mark(number)) < len(texts(message)):
            return number
    return None


def _as_parts(message: Message) -> Message:
    if isinstance(message["content"], str):
        return {**message, "content": [{"type": "text", "text": message["content"]}]}
    return message


def _raise_exception(message: str) -> None:
    raise InputError(f"the chat template refuses these messages: {message}")


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
