"""The activations between two projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": nn.functional.relu,
}


def activation(kind: str) -> Callable[[Tensor], Tensor]:
    """The torch function of an activation's name."""
    return _FUNCTIONS[kind]


@torch.library.custom_op("edgevlm::activate", mutates_args=())
def _activate(x: Tensor, kind: str) -> Tensor:
    return activation(kind)(x)


@_activate.register_fake
def _(x: Tensor, kind: str) -> Tensor:
    return torch.empty_like(x)


def activate(x: Tensor, kind: Activation) -> Tensor:
    """Apply one activation, elementwise."""
    out: Tensor = _activate(x, kind)
    return out
