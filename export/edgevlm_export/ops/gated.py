"""The gated activation of a gated MLP: act(gate) * up."""

from __future__ import annotations

import torch
from torch import Tensor

from edgevlm_export.ops.activate import Activation, activation


@torch.library.custom_op("edgevlm::gated", mutates_args=())
def _gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return activation(kind)(gate) * up


@_gated.register_fake
def _(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return torch.empty_like(gate)


def gated(gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
    """Multiply the activated gate by the up projection."""
    out: Tensor = _gated(gate, up, kind)
    return out
