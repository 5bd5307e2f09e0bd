"""Drawn weights: seeded, one tensor at a time, scaled so that the model is not degenerate.

A linear map keeps the size of its input, so that attention attends to something and a picture
matters; the head is twice that, so that logits have a deviation above 1 and greedy answers vary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from edgevlm.model.vlm import Vlm, place

HEAD_GAIN = 2.0


def draw_weights(model: Vlm, seed: int) -> None:
    """Give every weight of a model seeded values; the same whatever the order of the weights."""
    for name, weight in list(model.named_parameters()):
        place(model, name, _drawn(name, weight.shape, seed, tied=model.spec.decoder.tied))
    model.tie()


def _drawn(name: str, shape: torch.Size, seed: int, *, tied: bool) -> Tensor:
    """One weight."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    value = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    if name == "decoder.head.weight" or (tied and name == "embedding.weight"):
        return value.mul_(HEAD_GAIN * shape[-1] ** -0.5)
    if len(shape) == 1:
        centre = 1.0 if "norm" in name and name.endswith(".weight") else 0.0
        return value.mul_(0.05).add_(centre)
    if name == "embedding.weight" or name.endswith("position.weight"):
        return value
    return value.mul_(shape[1:].numel() ** -0.5)
