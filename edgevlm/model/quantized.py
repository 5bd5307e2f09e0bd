"""Quantized linear maps and embeddings: what a scheme puts in the place of a float module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgevlm.quant.spec import Scheme
from edgevlm_export.ops import dequantized, num_groups, quant_linear

_STORAGE = {"int4": torch.int8, "int8": torch.int8, "int16": torch.int16}


class QuantLinear(nn.Module):
    """A linear map of quantized weights, in one op; its tensors are filled in by a pass."""

    def __init__(self, rows: int, columns: int, bias: bool, scheme: Scheme) -> None:
        """Make empty tensors for weights [rows, columns]."""
        super().__init__()
        self.scheme = scheme
        weights, activations = scheme.weights, scheme.activations
        storage = _STORAGE.get(weights.dtype) or getattr(torch, weights.dtype)
        shape = (rows, num_groups(columns, weights.group_size))
        self.weight = _frozen(torch.zeros(rows, columns, dtype=storage))
        self.scale = _frozen(torch.ones(shape))
        self.zero = None if weights.symmetric else _frozen(torch.zeros(shape, dtype=storage))
        self.bias = _frozen(torch.zeros(rows)) if bias else None
        is_static = activations is not None and activations.is_static
        self.x_scale = _frozen(torch.ones(())) if is_static else None
        self.x_zero = _frozen(torch.zeros((), dtype=torch.int32)) if is_static else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        weights, activations = self.scheme.weights, self.scheme.activations
        return quant_linear(
            x,
            self.weight,
            self.scale,
            self.zero,
            self.bias,
            self.x_scale,
            self.x_zero,
            weights.bits,
            weights.group_size,
            "" if activations is None else activations.dtype,
            "" if activations is None else activations.scales,
        )

    def float_weight(self) -> Tensor:
        """The weights [N, K] that it multiplies with, in float32."""
        return dequantized(self.weight, self.scale, self.zero, self.scheme.weights.group_size)


class QuantEmbedding(nn.Module):
    """A table of quantized rows."""

    def __init__(self, rows: int, width: int, scheme: Scheme) -> None:
        """Make empty tensors for a table [rows, width]."""
        super().__init__()
        self.scheme = scheme
        self.weight = _frozen(torch.zeros(rows, width, dtype=torch.int8))
        self.scale = _frozen(torch.ones(rows, num_groups(width, scheme.weights.group_size)))

    def forward(self, token_ids: Tensor) -> Tensor:
        """Map [...] to [..., W]."""
        flat = token_ids.flatten()
        size = self.scheme.weights.group_size
        rows: Tensor = dequantized(self.weight[flat], self.scale[flat], None, size)
        shaped: Tensor = rows.unflatten(0, token_ids.shape)
        return shaped


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
