"""Layer norm over the last axis: (x - mean) / deviation * weight + bias."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("edgevlm::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the last axis."""
    out: Tensor = _layer_norm(x, weight, bias, eps)
    return out
