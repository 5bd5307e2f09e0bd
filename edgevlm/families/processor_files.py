"""The JSON files that a checkpoint's processor is made from, by their Hugging Face names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgevlm.errors import ModelError

PROCESSOR = "processor_config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
OLD_TEMPLATE = "chat_template.json"


def json_file(files: Mapping[str, bytes], name: str) -> dict[str, Any] | None:
    """The object in a JSON file, None where the checkpoint has no such file."""
    data = files.get(name)
    if data is None:
        return None
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ModelError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{name} holds a {type(value).__name__}, expected an object")
    return value


def needed_json_file(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in a JSON file that must be there."""
    value = json_file(files, name)
    if value is None:
        raise ModelError(
            f"the checkpoint has no {name}", hint="take it from the checkpoint's own repository"
        )
    return value


def image_processor(files: Mapping[str, bytes]) -> tuple[dict[str, Any], str, str]:
    """The image processor's fields, the file they stand in, and their path in it."""
    nested = (json_file(files, PROCESSOR) or {}).get("image_processor")
    if isinstance(nested, dict):
        return nested, PROCESSOR, "image_processor."
    return needed_json_file(files, IMAGE_PROCESSOR), IMAGE_PROCESSOR, ""
