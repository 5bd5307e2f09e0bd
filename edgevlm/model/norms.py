"""Norms over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgevlm.model.spec import NormSpec
from edgevlm_export.ops import layer_norm, rms_norm


class RmsNorm(nn.Module):
    """Divides by the root mean square, then scales."""

    def __init__(self, width: int, eps: float) -> None:
        """Start as the identity scale."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., W]."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Subtracts the mean, divides by the deviation, then scales and shifts."""

    def __init__(self, width: int, eps: float) -> None:
        """Start as the identity scale and shift."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., W]."""
        return layer_norm(x, self.weight, self.bias, self.eps)


class HeadNorm(nn.Module):
    """A norm of each head alone, with one scale for all heads."""

    def __init__(self, head_dim: int, spec: NormSpec) -> None:
        """Hold the scale of one head."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.eps = spec.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, T, H*D] in groups of D."""
        heads = x.reshape(*x.shape[:-1], -1, self.weight.shape[0])
        return rms_norm(heads, self.weight, self.eps).flatten(-2)


def build_norm(width: int, spec: NormSpec) -> RmsNorm | LayerNorm:
    """The module of a norm."""
    if spec.kind == "rms":
        return RmsNorm(width, spec.eps)
    return LayerNorm(width, spec.eps)
