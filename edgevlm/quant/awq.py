"""AWQ (Lin et al., 2024): columns of large inputs are scaled up before rounding, inputs down.

    x W^T = (x / s) (W diag(s))^T

A column that is larger than its neighbours in a group is rounded more finely than they are. How
much each is scaled is a power of what its inputs are like, over one of what its weights are like
where that helps; which power is found by trying. The error is the exact d H d^T (see `gptq`), so no
inputs are kept. Who takes the division by s, a norm or the map before, is up to the caller.
"""

# N outputs, K inputs

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edgevlm.quant.affine import QuantTensor, group_spans, quantize
from edgevlm.quant.gptq import Hessian, output_errors
from edgevlm.quant.ranges import RangeMethod, weight_scales
from edgevlm.quant.refine import clip_search
from edgevlm.quant.rtn import rtn

NUM_EXPONENTS = 20
# Rows that every candidate is tried on, and candidates that are then tried on all.
NUM_SAMPLE_ROWS = 128
NUM_FINALISTS = 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AwqScale:
    """The best scale [K] of an input that was found, float32; all ones where none was better.

    The objectives are the mean squared errors of all outputs of all maps, with it and without.
    """

    scale: Tensor
    objective: float
    rtn_objective: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AwqResult:
    """What AWQ made of the maps that read one input.

    `tensors` are the integers of weights * `scale` [K]; the input is to be divided by it.
    `objective` is the mean squared error of all outputs of all maps, `rtn_objective` that of what
    `rtn` gives with the same arguments; where this was better, it was `kept` with a scale of 1.
    """

    scale: Tensor
    tensors: tuple[QuantTensor, ...]
    objective: float
    rtn_objective: float
    kept: Literal["awq", "rtn"]


def awq(
    weights: Sequence[Tensor],
    hessian: Hessian,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    ranges: RangeMethod = "minmax",
    clip: bool = True,
) -> AwqResult:
    """Search the scale of the input [K] that all of `weights` [N, K] read, then clip groups.

    The result is never worse than rounding to nearest.
    """
    found = awq_scale(
        weights,
        hessian,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        ranges=ranges,
    )
    grid = _Grid(bits, group_size, symmetric, ranges, weighs=True)
    mean_KK, scale = hessian.mean(), found.scale
    divided = hessian.divided(scale)
    divided_KK = divided.mean()
    scaled = [weight.float() * scale for weight in weights]
    tensors = [grid.rounded(weight, divided_KK.diagonal()) for weight in scaled]
    if clip:
        pairs = zip(scaled, tensors, strict=True)
        tensors = [clip_search(weight, tensor, divided) for weight, tensor in pairs]
    nearest = [
        rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric, ranges=ranges)
        for weight in weights
    ]
    objective = _total_error(scaled, tensors, divided_KK)
    rtn_objective = _total_error(weights, nearest, mean_KK)
    is_better = objective < rtn_objective
    return AwqResult(
        scale=scale if is_better else torch.ones_like(scale),
        tensors=tuple(tensors if is_better else nearest),
        objective=min(objective, rtn_objective),
        rtn_objective=rtn_objective,
        kept="awq" if is_better else "rtn",
    )


def awq_scale(
    weights: Sequence[Tensor],
    hessian: Hessian,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    ranges: RangeMethod = "minmax",
    weighs: bool = True,
    pooled: Callable[[Tensor], Tensor] = lambda size_K: size_K,
) -> AwqScale:
    """Search the scale of the input [K] that all of `weights` [N, K] read, and round nothing.

    Candidates are compared on evenly spaced rows, the best of them and none at all on all rows.
    Ranges that are searched for weigh columns by the mean square of their inputs where `weighs` is
    true, else alike, as `rtn` does: a scale found for the one is bad for the other. `pooled` gives
    columns that can only be scaled alike one size [K], of the sizes that they have.
    """
    grid = _Grid(bits, group_size, symmetric, ranges, weighs)
    mean_KK = hessian.mean()
    sample = _sample(weights)
    inputs_K = pooled(hessian.channel_absmean)
    weights_K = pooled(_mean_size(weights, group_size))
    candidates = [torch.ones_like(inputs_K), *_candidates(inputs_K, weights_K)]
    scores = [grid.error(sample, mean_KK, scale) for scale in candidates]
    ranked = sorted(range(1, len(candidates)), key=scores.__getitem__)
    finalists = [candidates[0], *(candidates[index] for index in ranked[:NUM_FINALISTS])]
    errors = [sum(grid.error(weight, mean_KK, scale) for weight in weights) for scale in finalists]
    objective = min(errors)
    return AwqScale(
        scale=finalists[errors.index(objective)], objective=objective, rtn_objective=errors[0]
    )


@dataclass(frozen=True, slots=True)
class _Grid:
    """How candidates are rounded."""

    bits: int
    group_size: int
    symmetric: bool
    ranges: RangeMethod
    weighs: bool

    def rounded(self, weight: Tensor, square_K: Tensor) -> QuantTensor:
        """Round weights [N, K] to nearest, for inputs of these mean squares."""
        scale, zero = weight_scales(
            weight,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            method=self.ranges,
            importance=square_K if self.weighs else None,
        )
        return quantize(weight, scale, zero, bits=self.bits, group_size=self.group_size)

    def error(self, weight: Tensor, mean_KK: Tensor, scale_K: Tensor) -> float:
        """The summed error of the outputs of weights that are scaled and rounded to nearest."""
        square_K = mean_KK.diagonal() / scale_K.square()
        rounded = self.rounded(weight.float() * scale_K, square_K)
        d_NK = weight.float() - rounded.dequantize() / scale_K
        return float((d_NK @ mean_KK).mul_(d_NK).sum(dtype=torch.float64))


def _total_error(
    weights: Sequence[Tensor], tensors: Sequence[QuantTensor], mean_KK: Tensor
) -> float:
    """The summed error of all outputs of all maps."""
    pairs = zip(weights, tensors, strict=True)
    return sum(float(output_errors(weight, tensor, mean_KK).sum()) for weight, tensor in pairs)


def _candidates(inputs_K: Tensor, weights_K: Tensor) -> Iterator[Tensor]:
    """Scales [K]: powers of the inputs' mean size, alone and over powers of the weights' mean."""
    inputs_K, weights_K = _without_zeros(inputs_K), _without_zeros(weights_K)
    for step in range(1, NUM_EXPONENTS + 1):
        exponent = step / NUM_EXPONENTS
        yield _centred(inputs_K**exponent)
        if step < NUM_EXPONENTS:
            yield _centred(inputs_K**exponent / weights_K ** (1 - exponent))


def _mean_size(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """How large each column [K] is within its group, as a mean over all rows of all weights."""
    sizes_K = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight in weights:
        for columns, _, width in group_spans(len(sizes_K), group_size):
            part_NGW = weight[:, columns].float().abs().unflatten(1, (-1, width))
            most_NG1 = part_NGW.amax(dim=2, keepdim=True)
            share_NGW = part_NGW / torch.where(most_NG1 > 0, most_NG1, 1.0)
            sizes_K[columns] += share_NGW.sum(dim=0).flatten()
    return sizes_K / sum(len(weight) for weight in weights)


def _without_zeros(size_K: Tensor) -> Tensor:
    """A channel that is never on is taken for one of middling size."""
    is_on_K = size_K > 0
    middle = size_K[is_on_K].median() if bool(is_on_K.any()) else torch.ones(())
    return torch.where(is_on_K, size_K, middle)


def _centred(scale_K: Tensor) -> Tensor:
    """The scale times what brings its ends to equal distances from 1."""
    return scale_K / (scale_K.max() * scale_K.min()).sqrt()


def _sample(weights: Sequence[Tensor]) -> Tensor:
    """Evenly spaced rows of all weights together."""
    rows = torch.cat([weight.float() for weight in weights])
    step = max(1, len(rows) // NUM_SAMPLE_ROWS)
    return rows[step // 2 :: step]
