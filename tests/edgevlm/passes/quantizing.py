"""What tests of quantization ask for, and how they look at what came of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes import Foresight, Quantize
from edgevlm.quant.harm import logits_along
from tests.edgevlm.calibrated import context, samples_of
from tests.edgevlm.tiny import tiny_spec

EVERYTHING = {
    "vision": "w8a8",
    "projector": {"scheme": "w8a8", "activations": "static"},
    "decoder": {"scheme": "w4a16", "method": "gptq", "symmetric": False},
    "prefill": "w8a8",
    "head": {"scheme": "w8a16", "group_size": 32},
    "embedding": "int8",
    "kv": "int8",
    "sites": (
        {"match": "decoder.layers.0.mlp.down", "skip": "it does the most harm"},
        {"match": "*.layers.1.mlp.up", "skip": "both are left"},
    ),
    "bias_correction": True,
}


def foreseen(
    options: dict[str, Any], targets: tuple[str, ...] = ("ort",), spec: VlmSpec | None = None
) -> Foresight:
    return Quantize.model_validate(options).foresee(spec or tiny_spec(), context(targets=targets))


def probe(model: Vlm) -> Tensor:
    """Logits of a prompt with a picture and of an answer after it."""
    (case,) = samples_of(model.spec, 1, seed=7)
    return torch.from_numpy(logits_along(model, [case])[0])
