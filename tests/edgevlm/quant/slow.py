"""Quantization as its definitions say it, in float64 and with loops; and data to try it on."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevlm.quant.gptq import Hessian

Floats = NDArray[np.float64]

RATIOS = {bits: np.linspace(1.0, 0.3 if bits < 5 else 0.7, 24) for bits in range(3, 17)}


def drawn_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Weights with a few large ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (1 + 4 * (torch.rand(rows, columns, generator=generator) < 0.02))


def drawn_inputs(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs whose channels differ in size, and move together."""
    generator = torch.Generator().manual_seed(seed + 100)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(rows, columns, generator=generator) @ (mixing + torch.eye(columns))
    return x * torch.exp(torch.randn(columns, generator=generator))


def hessian_of(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[-1])
    hessian.update(x)
    return hessian


def groups_of(columns: int, group_size: int) -> list[slice]:
    size = group_size or columns
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def limits(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def round_to(steps: float, zero: float, bits: int) -> int:
    """The integer of a number in steps of its grid; Python rounds half to even."""
    low, high = limits(bits)
    return int(min(max(round(float(steps)) + zero, low), high))


def minmax_grid(group: Floats, bits: int, symmetric: bool) -> tuple[float, float]:
    low, high = limits(bits)
    least, most = min(0.0, float(group.min())), max(0.0, float(group.max()))
    if symmetric:
        return max(most / high, least / low) or 1.0, 0.0
    scale = (most - least) / (high - low) or 1.0
    return scale, float(min(max(low - round(least / scale), low), high))


def searched_error(
    group: Floats, counts: Floats, bits: int, symmetric: bool, signed: bool = False
) -> float:
    """The least weighted squared error over clipped ranges, each with its best scale."""
    best = float((counts * group**2).sum())
    for sign in (1.0, -1.0) if signed and symmetric else (1.0,):
        widest, zero = minmax_grid(sign * group, bits, symmetric)
        for ratio in RATIOS[bits]:
            q = np.array([round_to(sign * w / (widest * ratio), zero, bits) - zero for w in group])
            square = float((counts * q * q).sum())
            if square:
                scale = float((counts * q * group).sum()) / square
                best = min(best, float((counts * (group - scale * q) ** 2).sum()))
    return best


def rtn(weight: Floats, bits: int, group_size: int, symmetric: bool) -> tuple[Floats, Floats]:
    """Integers less their zeros, and the weights that they mean."""
    values, meant = np.zeros_like(weight), np.zeros_like(weight)
    for row in range(len(weight)):
        for span in groups_of(weight.shape[1], group_size):
            scale, zero = minmax_grid(weight[row, span], bits, symmetric)
            for column in range(span.start, span.stop):
                values[row, column] = round_to(weight[row, column] / scale, zero, bits) - zero
                meant[row, column] = values[row, column] * scale
    return values, meant


def output_error(weight: Floats, meant: Floats, x: Floats) -> float:
    """The mean squared error of all outputs, from the inputs themselves."""
    return float((((weight - meant) @ x.T) ** 2).sum(axis=0).mean())


def float64(tensor: Tensor) -> Floats:
    return np.asarray(tensor.detach().double().numpy())
