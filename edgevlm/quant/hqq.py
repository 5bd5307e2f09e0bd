"""HQQ (Badri and Shaji, 2023): scales and zeros from the weights alone, blind to outliers.

Where squares let the few largest errors decide, the sum of |error|^p with p < 1 lets the many small
ones. It is brought down by half-quadratic splitting: the errors are shrunk to what the norm takes
for outliers, and the grid is fitted by least squares to the weights without these.
"""

# N outputs, G groups of W columns

from __future__ import annotations

import torch
from torch import Tensor

from edgevlm.quant.affine import QuantTensor, group_spans, integer_range, quantize
from edgevlm.quant.ranges import CHUNK, RangeMethod, weight_scales

NORM = 0.7
# Weight of the quadratic term, in steps of the grid, and its growth from round to round.
BETA, BETA_GROWTH = 10.0, 1.01
NUM_ROUNDS = 20
# Smaller errors than this, in steps, are none: a negative power has no value at zero.
LEAST_ERROR = 1e-6


def hqq(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    ranges: RangeMethod = "minmax",
) -> QuantTensor:
    """Round weights [N, K] to the grid with the least sum of |error|^0.7 in every group.

    Begins with the grid of `ranges`, and no group ends up worse than with that. The paper keeps the
    scale and fits a zero in floats; here zeros are integers and scales are fitted with them, and
    errors are measured in steps, so that the size of the weights does not matter.
    """
    scale_NG, zero_NG = weight_scales(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, method=ranges
    )
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        for columns, groups, width in group_spans(weight.shape[1], group_size):
            zero = None if zero_NG is None else zero_NG[rows, groups].float()
            scale, zero = _fit(
                weight[rows, columns].float().unflatten(1, (-1, width)),
                scale_NG[rows, groups],
                zero,
                bits,
            )
            scale_NG[rows, groups] = scale
            if zero_NG is not None and zero is not None:
                zero_NG[rows, groups] = zero.to(zero_NG.dtype)
    return quantize(weight, scale_NG, zero_NG, bits=bits, group_size=group_size)


def _fit(
    part_NGW: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int
) -> tuple[Tensor, Tensor | None]:
    """The best scales and zeros [N, G] of all rounds, the given ones among them."""
    low, high = integer_range(bits)
    shift_NG = torch.zeros_like(scale_NG) if zero_NG is None else zero_NG
    best_scale_NG, best_shift_NG = scale_NG, shift_NG
    least_NG = torch.full_like(scale_NG, torch.inf)
    for index in range(NUM_ROUNDS + 1):
        steps_NGW = part_NGW / scale_NG[..., None]
        shift_NG1 = shift_NG[..., None]
        value_NGW = (steps_NGW.round() + shift_NG1).clamp_(low, high)
        error_NGW = steps_NGW - (value_NGW - shift_NG1)
        size_NGW = error_NGW.abs().clamp_(min=LEAST_ERROR)
        pull_NGW = size_NGW.pow(NORM - 1)
        loss_NG = torch.linalg.vecdot(size_NGW, pull_NGW) * scale_NG.abs().pow(NORM)
        is_better_NG = loss_NG < least_NG
        least_NG = torch.where(is_better_NG, loss_NG, least_NG)
        best_scale_NG = torch.where(is_better_NG, scale_NG, best_scale_NG)
        best_shift_NG = torch.where(is_better_NG, shift_NG, best_shift_NG)
        shrunk_NGW = (size_NGW - pull_NGW / (BETA * BETA_GROWTH**index)).clamp_(min=0.0)
        target_NGW = steps_NGW - shrunk_NGW.copysign_(error_NGW)
        if zero_NG is not None:
            shift_NG = (value_NGW - target_NGW).mean(dim=2).round_().clamp_(low, high)
        value_NGW -= shift_NG[..., None]
        square_NG = torch.linalg.vecdot(value_NGW, value_NGW)
        ratio_NG = torch.linalg.vecdot(target_NGW, value_NGW) / square_NG.clamp(min=1.0)
        # A group that has rounded to zero, or would turn its sign, keeps its scale.
        scale_NG = torch.where(ratio_NG > 0, scale_NG * ratio_NG, scale_NG)
    return best_scale_NG, None if zero_NG is None else best_shift_NG
