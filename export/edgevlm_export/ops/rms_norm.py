"""Root-mean-square norm over the last axis: x / rms(x) * weight."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("edgevlm::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    variance = x.float().square().mean(dim=-1, keepdim=True)
    normed = (x.float() * torch.rsqrt(variance + eps)).to(x.dtype)
    return normed * (weight + 1 if unit_offset else weight)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    return torch.empty_like(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """Normalise the last axis; `unit_offset` scales by weight + 1 (Gemma)."""
    out: Tensor = _rms_norm(x, weight, eps, unit_offset)
    return out
