"""Bias correction (Nagel et al., 2019): outputs get back what rounding takes from their means."""

from __future__ import annotations

from torch import Tensor


def bias_correction(weight: Tensor, effective: Tensor, mean: Tensor) -> Tensor:
    """What to add to the bias [N] where `effective` takes the place of `weight` [N, K].

    `mean` [K] is that of the inputs. Outputs then have the mean that they had, float32.
    """
    return ((weight.double() - effective.double()) @ mean.double()).float()
