"""SmoothQuant (Xiao et al., 2023): part of what makes activations uneven goes into the weights.

    x W^T = (x / s) (W diag(s))^T,    s = absmax(x)^alpha / absmax(W)^(1 - alpha)

Exact in floats; after it both have channels of like size, and one scale does for a whole row of
activations.
"""

# K inputs

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Scales beyond these would leave float32 weights or activations with little but rounding.
LEAST, MOST = 1e-5, 1e5


def smooth_scales(
    activation_absmax: Tensor, weights: Sequence[Tensor], *, alpha: float = 0.5
) -> Tensor:
    """The scale [K], float32, of an input that all of `weights` [N, K] read.

    The input is to be divided by it, the weights' columns to be multiplied. A channel without
    input, or that no weight reads, keeps its scale of 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha {alpha:g} is not within 0 to 1")
    most_K = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).double()
    scale_K = activation_absmax.double() ** alpha / most_K ** (1 - alpha)
    is_used_K = (activation_absmax > 0) & (most_K > 0)
    return torch.where(is_used_K, scale_K.clamp(LEAST, MOST), 1.0).float()
