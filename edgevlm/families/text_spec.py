"""From a checkpoint's tokenizer and template files to the runtime's `TextSpec`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import minijinja

from edgevlm.errors import ModelError
from edgevlm.families.processor_files import (
    OLD_TEMPLATE,
    PROCESSOR,
    SPECIAL_TOKENS,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    json_file,
    needed_json_file,
)
from edgevlm_runtime.errors import EdgeVlmError
from edgevlm_runtime.text import TextSpec, TileMarks, render

# The names that transformers gives to a template.
SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


def text_spec(
    files: Mapping[str, bytes], *, image_token_id: int, expansion: str, positions: str
) -> TextSpec:
    """Read the chat template, the names of special tokens, and the image token's text.

    `expansion` is `plain` (image tokens alone) or `tiled` (the marks of Idefics3); `positions` is
    `sequential` or `mrope`.
    """
    config = needed_json_file(files, TOKENIZER_CONFIG)
    if config.get("split_special_tokens"):
        raise ModelError(
            f"{TOKENIZER_CONFIG}: split_special_tokens is true, image tokens would not be found",
            hint="compile a checkpoint without it",
        )
    template = _chat_template(files, config)
    spec = TextSpec(
        chat_template=template,
        special=_special(files, config, template),
        image_token=_image_token(files, image_token_id),
        image_token_id=image_token_id,
        tile_marks=TileMarks() if expansion == "tiled" else None,
        positions=positions,
    )
    _check_renders(spec)
    return spec


def tokenizer_json(folder: Path, spec: TextSpec) -> bytes:
    """The bytes of `tokenizer.json` for a bundle: the tokenizer as transformers loads it.

    transformers builds the pipeline of many tokenizer classes anew instead of taking it from the
    checkpoint's `tokenizer.json`, and adds tokens from other files; so the bundle gets what it
    makes.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    named = {name: text for name, text in tokenizer.special_tokens_map.items() if name in _USED}
    ours = {name: text for name, text in spec.special.items() if name in _USED}
    if named != ours:
        raise ModelError(
            f"transformers names the special tokens {named}, {TOKENIZER_CONFIG} {ours}",
            hint=f"write every special token into {TOKENIZER_CONFIG}",
        )
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str()).encode()


# The special tokens that decide how a prompt is rendered and tokenized.
_USED = ("bos_token", "eos_token")


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str:
    """The template in the place where transformers looks first."""
    processor = json_file(files, PROCESSOR) or {}
    old = json_file(files, OLD_TEMPLATE) or {}
    found = processor.get("chat_template") or old.get("chat_template")
    if found is None and TEMPLATE in files:
        try:
            found = files[TEMPLATE].decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{TEMPLATE} is not UTF-8: {error}") from error
    if found is None:
        found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found}
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str):
        raise ModelError(
            "the checkpoint has no chat template",
            hint=f"add a {TEMPLATE}, or compile an instruction-tuned checkpoint",
        )
    # These marks only tell training which text is the answer's.
    return _GENERATION.sub(
        lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", found
    )


def _special(
    files: Mapping[str, bytes], config: Mapping[str, Any], template: str
) -> dict[str, str]:
    """The special tokens by name, from where transformers takes them."""
    named = dict(config)
    if "added_tokens_decoder" not in config:
        named.update(json_file(files, SPECIAL_TOKENS) or {})
    special = {}
    for name in SPECIAL_NAMES:
        value = named.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            special[name] = text
        elif text is not None:
            raise ModelError(f"{TOKENIZER_CONFIG}: {name} is {value!r}, expected a text")
    try:
        used = minijinja.Environment().undeclared_variables_in_str(template)
    except minijinja.TemplateError as error:
        raise ModelError(f"chat template: {error.message.splitlines()[0]}") from error
    for name in sorted(used & set(SPECIAL_NAMES)):
        if name not in named:
            raise ModelError(
                f"the chat template uses {name}, which {TOKENIZER_CONFIG} does not have",
                hint=f"write {name} into {TOKENIZER_CONFIG}, null if there is none",
            )
    return special


def _image_token(files: Mapping[str, bytes], image_token_id: int) -> str:
    """The text of the image token, which must be a token that the tokenizer never splits."""
    added = needed_json_file(files, TOKENIZER).get("added_tokens", [])
    found = {token["id"]: token["content"] for token in added}.get(image_token_id)
    if not isinstance(found, str):
        raise ModelError(
            f"{TOKENIZER} has no added token of id {image_token_id}, the model's image token",
            hint="take tokenizer.json and config.json from the same checkpoint",
        )
    named = (json_file(files, PROCESSOR) or {}).get("image_token", found)
    if named != found:
        raise ModelError(
            f"{PROCESSOR}: image_token is {named!r}, the model's image token "
            f"{image_token_id} is {found!r}",
            hint="take both files from the same checkpoint",
        )
    return found


def _check_renders(spec: TextSpec) -> None:
    """The template must place one picture and the question."""
    question = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    try:
        text = render([{"role": "user", "content": question}], spec)
    except EdgeVlmError as error:
        raise ModelError(error.message, hint=error.hint) from error
    number = text.count(spec.image_token)
    if number != 1:
        raise ModelError(
            f"the chat template writes {spec.image_token!r} {number} times for one picture",
            hint="compile a checkpoint whose template places pictures",
        )
