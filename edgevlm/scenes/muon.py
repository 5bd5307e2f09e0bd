"""Muon (Jordan et al., 2024) for many equal matrices on any machine.

`torch.optim.Muon` orthogonalizes one matrix at a time and always in bfloat16, which a processor
without bfloat16 products emulates: 6.6 s for a step of this model, where this one takes 0.16 s.
Here the matrices of one shape are orthogonalized together, in the precision the machine is fast in.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from edgevlm.scenes.precision import fast_dtype

_MOMENTUM = 0.95
_WEIGHT_DECAY = 0.01
# The quintic of the Newton-Schulz iteration: it takes every singular value near 1 in five steps.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_NUM_STEPS = 5
# An update has then the root mean square of AdamW's, whose learning rates can be used as they are.
_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, for parameters of two dimensions.

    Equal to `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` up to the precision of the
    orthogonalization.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """Groups of parameters; the learning rate of a group is its `lr`."""
        super().__init__(groups, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                updates = orthogonalize(torch.stack([self._momentum(p) for p in parameters]))
                rate = group["lr"] * _RMS * max(shape) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * _WEIGHT_DECAY)
                    parameter.add_(update, alpha=-rate)

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        gradient = parameter.grad
        if gradient is None:
            raise ValueError("no gradient")
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(state["momentum"], _MOMENTUM)


def orthogonalize(matrices_NAB: torch.Tensor) -> torch.Tensor:
    """The nearest matrices, roughly, whose singular values are all 1; shape and dtype are kept."""
    linear, cubic, quintic = _QUINTIC
    tall = matrices_NAB.shape[1] > matrices_NAB.shape[2]
    x = matrices_NAB.to(fast_dtype(matrices_NAB.device))
    x = x.mT if tall else x
    norms: torch.Tensor = torch.linalg.matrix_norm(x, keepdim=True)
    x = x / norms.clamp(min=1e-7)
    for _ in range(_NUM_STEPS):
        gram = x @ x.mT
        x = linear * x + (cubic * gram + quintic * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices_NAB.dtype)
