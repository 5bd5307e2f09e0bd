"""From a checkpoint's tokenizer and processor files to the runtime's `TextSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm_runtime.text import TextSpec


def text_spec(
    files: Mapping[str, bytes], config: Mapping[str, Any], *, expansion: str, positions: str
) -> TextSpec:
    """Read `tokenizer_config.json`, the chat template, and `tokenizer.json`, from `files` by name.

    `config` is the model's `config.json`, for the image token's id.
    """
    raise NotImplementedError
