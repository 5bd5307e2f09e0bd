"""Families: one file per model type, from `config.json` to a spec, from weight names to ours.

A family is a module with `spec(config, files, choices) -> VlmSpec` and `weights(spec) -> Weights`;
it is imported when a checkpoint of its type is opened, and imports no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from edgevlm.errors import ModelError
from edgevlm.families.image_spec import ImageChoices
from edgevlm.families.weights import Weights
from edgevlm.model.spec import VlmSpec

__all__ = ["FAMILIES", "Family", "family_of"]

# model_type of config.json: module of this package
FAMILIES: dict[str, str] = {
    "idefics3": "idefics3",
    "llava": "llava",
    "qwen2_5_vl": "qwen2_5_vl",
    "smolvlm": "idefics3",
}


class Family(Protocol):
    """What a family's module offers.

    `EXPANSION` and `POSITIONS` are how image tokens and positions are written (`TextSpec`).
    """

    EXPANSION: str
    POSITIONS: str

    def spec(
        self, config: Mapping[str, Any], files: Mapping[str, bytes], choices: ImageChoices
    ) -> VlmSpec:
        """The spec of a checkpoint; `files` are its JSON, tokenizer and template files by name."""
        ...

    def weights(self, spec: VlmSpec) -> Weights:
        """Where each weight of our model comes from."""
        ...


def family_of(model_type: object) -> Family:
    """The family of a `model_type`."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(repr(name) for name in sorted(FAMILIES))
        raise ModelError(
            f"config.json: model_type is {model_type!r}, expected one of {known}",
            hint="compile a model of one of these types, or add a file to edgevlm/families",
        )
    return cast(Family, importlib.import_module(f"edgevlm.families.{FAMILIES[model_type]}"))
