"""Drawn weights: seeded, one tensor at a time, scaled so that the model is not degenerate.

A linear map keeps the size of its input, so that attention attends to something; the head doubles
it, so that logits have a deviation of 2. A head that is the embedding needs two things more. It
makes embedded tokens small, so what the projector and the layers add is as small, else it would
drown the tokens. And it would answer with the last token again and again, so the last norm turns
the sign of half the features.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm, place

HEAD_GAIN = 2.0
# All layers together are louder than the last token, which would else decide alone.
DEPTH_GAIN = 2.0
LAYER = re.compile(r"decoder\.layers\.\d+\.(attention\.out|mlp\.down)")
PROJECTOR = re.compile(r"projector\.(down|linear)")


def draw_weights(model: Vlm, seed: int) -> None:
    """Give every weight of a model seeded values; the same whatever the order of the weights."""
    for name, weight in list(model.named_parameters()):
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        value = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
        place(model, name, _scaled(model.spec, name, value))
    model.tie()


def _scaled(spec: VlmSpec, name: str, value: Tensor) -> Tensor:
    """A weight of standard normal numbers, at its scale."""
    owner, _, kind = name.rpartition(".")
    small = HEAD_GAIN * spec.decoder.width**-0.5
    if name == "decoder.head.weight" or (spec.decoder.tied and name == "embedding.weight"):
        return value.mul_(small)
    if spec.decoder.tied and name == "decoder.norm.weight":
        return value.sign_()
    if value.dim() == 1:
        return value.mul_(0.05).add_(1.0 if "norm" in owner and kind == "weight" else 0.0)
    if name == "embedding.weight" or owner.endswith("position"):
        return value
    gain = 1.0
    if spec.decoder.tied and PROJECTOR.fullmatch(owner):
        gain = small
    elif spec.decoder.tied and LAYER.fullmatch(owner):
        gain = small * DEPTH_GAIN * len(spec.decoder.layers) ** -0.5
    return value.mul_(gain * value[0].numel() ** -0.5)
