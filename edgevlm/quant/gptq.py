"""GPTQ (Frantar et al., 2022): what rounding a column does wrong, the columns after it make up for.

The squared error of an output channel w rounded to q is d H d^T, with d = w - q and H the mean of
x^T x over inputs x. Columns are rounded one after the other, each to

    w_j + sum over i < j of d_i R_ij / R_jj,        H = R R^T, R upper triangular

which makes up for the errors so far as well as a column can. The paper gets the same numbers from
the Cholesky factor of H^-1; this is Babai's nearest plane (Chen et al., 2025), and inverts nothing.
The error is then the sum over j of R_jj^2 e_j^2, where e_j is what rounding moves column j by: what
a search for a group's scale weighs its columns with, which plain GPTQ weighs alike.
"""

# N outputs, K inputs, R rows of a batch, C columns of a block

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from edgevlm.errors import PassError
from edgevlm.quant.affine import QuantTensor, integer_range
from edgevlm.quant.ranges import RangeMethod, check_finite, weight_scales
from edgevlm.quant.rtn import rtn

# Where a matrix is singular even with its damping, the damping grows so often by this much.
DAMP_GROWTH = 10.0
MAX_DAMPINGS = 8
MAX_ROWS = 8192


class Hessian:
    """Second moments of a site's inputs, and the means of its channels, over all batches.

    `matrix` is the sum of x^T x [K, K], float32, over `count` rows; a row may count many times.
    """

    def __init__(self, columns: int, *, site: str | None = None, name: str = "quantize") -> None:
        """Begin with no rows; errors are those of the pass `name` at the site."""
        self.site, self.name = site, name
        self.matrix = torch.zeros(columns, columns)
        self.count = 0
        self._sum_K = torch.zeros(columns, dtype=torch.float64)
        self._abs_sum_K = torch.zeros(columns, dtype=torch.float64)

    def update(self, x: Tensor, times: int = 1) -> None:
        """Add a batch [..., K], `times` times; raises PassError where it has NaN or infinities."""
        x_RK = x.detach().reshape(-1, x.shape[-1]).float()
        abs_sum_K = x_RK.abs().sum(dim=0)
        if not bool(torch.isfinite(abs_sum_K).all()):
            check_finite(x_RK, "activations", site=self.site, name=self.name)
        self.matrix.addmm_(x_RK.T, x_RK, alpha=times)
        self._sum_K += x_RK.sum(dim=0) * times
        self._abs_sum_K += abs_sum_K * times
        self.count += len(x_RK) * times

    def mean(self) -> Tensor:
        """The mean of x^T x [K, K], float32."""
        self._check_seen()
        return self.matrix / self.count

    @property
    def channel_mean(self) -> Tensor:
        """The mean of every channel [K], float32."""
        self._check_seen()
        return (self._sum_K / self.count).float()

    @property
    def channel_absmean(self) -> Tensor:
        """The mean absolute value of every channel [K], float32."""
        self._check_seen()
        return (self._abs_sum_K / self.count).float()

    def divided(self, scale: Tensor) -> Hessian:
        """What it would be, had every input been divided by `scale` [K]."""
        other = Hessian(len(scale), site=self.site, name=self.name)
        other.matrix = self.matrix / torch.outer(scale, scale)
        other.count = self.count
        other._sum_K = self._sum_K / scale
        other._abs_sum_K = self._abs_sum_K / scale.abs()
        return other

    def _check_seen(self) -> None:
        if not self.count:
            raise PassError(
                "calibration never reached it",
                name=self.name,
                site=self.site,
                hint="give samples that use this part of the model, or leave it out with `skip`",
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GptqResult:
    """What GPTQ made of a matrix.

    `objective` is the mean squared error that the integers give all outputs together,
    tr(D H D^T), `rtn_objective` that of rounding to nearest. In `rtn_rows` output channels rounding
    to nearest was better, and was kept.
    """

    tensor: QuantTensor
    objective: float
    rtn_objective: float
    rtn_rows: int

    @property
    def kept(self) -> Literal["gptq", "rtn"]:
        """Which of the two most channels are from; `rtn` only where all of them are."""
        return "rtn" if self.rtn_rows == len(self.tensor.values) else "gptq"


def gptq(
    weight: Tensor,
    hessian: Hessian,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    ranges: RangeMethod = "minmax",
    damp: float = 0.01,
    act_order: bool = False,
    block: int = 128,
) -> GptqResult:
    """Round weights [N, K] column by column against the errors of the columns before.

    A group's scale is found when its first column is reached, from what the weights are by then.
    `act_order` rounds the columns of the largest inputs first; scales then come from the weights as
    given, and the layout stays one of neighbouring columns. `damp` is added to the diagonal as a
    share of its mean. A column without any input is rounded to nearest. Rows that would end up
    worse than what `rtn` gives with the same arguments are its rows.
    """
    mean_KK = hessian.mean()
    order_K = torch.arange(len(mean_KK), device=weight.device)
    if act_order:
        order_K = mean_KK.diagonal().argsort(descending=True, stable=True)
    factor_KK, square_K = unit_factor(mean_KK[order_K][:, order_K], damp)
    parts: list[QuantTensor] = []
    error, rtn_error, rtn_rows = 0.0, 0.0, 0
    # Rows do not see each other: the many of a head are rounded in parts, to bound the memory.
    for part in weight.float().split(MAX_ROWS):
        nearest = rtn(part, bits=bits, group_size=group_size, symmetric=symmetric, ranges=ranges)
        tensor = _walk(
            part.T[order_K].contiguous(),
            factor_KK,
            square_K,
            order_K,
            _start(part, nearest, square_K[order_K.argsort()], ranges),
            block,
            # A column's group is complete when it is reached only where columns keep their order.
            ranges if group_size and not act_order else None,
        )
        errors_N = output_errors(part, tensor, mean_KK)
        nearest_errors_N = output_errors(part, nearest, mean_KK)
        is_worse_N = nearest_errors_N <= errors_N
        parts.append(rows_of(is_worse_N, nearest, tensor))
        error += float(torch.minimum(errors_N, nearest_errors_N).sum())
        rtn_error += float(nearest_errors_N.sum())
        rtn_rows += int(is_worse_N.sum())
    zeros = [part.zero for part in parts if part.zero is not None]
    tensor = replace(
        parts[0],
        values=torch.cat([part.values for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None,
    )
    return GptqResult(tensor=tensor, objective=error, rtn_objective=rtn_error, rtn_rows=rtn_rows)


def output_errors(weight: Tensor, tensor: QuantTensor, mean_KK: Tensor) -> Tensor:
    """The mean squared error of every output channel [N], d H d^T, float64."""
    d_NK = weight.float() - tensor.dequantize()
    errors_N: Tensor = torch.linalg.vecdot((d_NK @ mean_KK).double(), d_NK.double())
    return errors_N.clamp_(min=0.0)


def unit_factor(mean_KK: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """R of H + damping = R R^T with its columns divided by its diagonal, and the diagonal squared.

    R [K, K] is upper triangular; both are float32. The damping is `damp` times the mean of the
    diagonal, and grows where the matrix is singular even so.
    """
    flipped_KK = mean_KK.double().flip(0, 1)
    share = float(flipped_KK.diagonal().mean()) or 1.0
    for attempt in range(MAX_DAMPINGS):
        damped_KK = flipped_KK.clone()
        damped_KK.diagonal().add_(share * damp * DAMP_GROWTH**attempt)
        lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
        if not int(failed):
            upper_KK = lower_KK.flip(0, 1)
            diagonal_K = upper_KK.diagonal()
            unit_KK: Tensor = upper_KK / diagonal_K
            return unit_KK.float(), diagonal_K.square().float()
    raise ValueError(f"no damping up to {damp * DAMP_GROWTH**attempt:g} makes the matrix regular")


def _start(
    weight: Tensor, nearest: QuantTensor, square_K: Tensor, ranges: RangeMethod
) -> QuantTensor:
    """The grid to begin with: where it is searched for, columns count by `square_K`."""
    if ranges not in ("mse", "mse_signed"):
        return nearest
    scale, zero = weight_scales(
        weight,
        bits=nearest.bits,
        group_size=nearest.group_size,
        symmetric=nearest.zero is None,
        method=ranges,
        importance=square_K,
    )
    return replace(nearest, scale=scale, zero=zero)


def _walk(
    weight_KN: Tensor,
    factor_KK: Tensor,
    square_K: Tensor,
    order_K: Tensor,
    grid: QuantTensor,
    block: int,
    ranges: RangeMethod | None,
) -> QuantTensor:
    """Round columns in turn; with `ranges` scales are found on the way, else those of the grid."""
    bits, size = grid.bits, grid.group_size
    low, high = integer_range(bits)
    num_columns, num_rows = weight_KN.shape
    scale_GN = grid.scale.T.contiguous()
    zero_GN = None if grid.zero is None else grid.zero.T.float()
    moved_KN = weight_KN.clone()
    values_KN = torch.empty_like(weight_KN)
    # Blocks end where groups end: all that a group's scale depends on is then up to date.
    step = size * max(1, block // size) if ranges else block
    columns = order_K.tolist()
    for start in range(0, num_columns, step):
        stop = min(start + step, num_columns)
        errors_CN = weight_KN.new_empty(stop - start, num_rows)
        for index in range(start, stop):
            group = columns[index] // size if size else 0
            if ranges and index % size == 0:
                group_CN = _expected(weight_KN, moved_KN, factor_KK, slice(index, index + size))
                scale, zero = weight_scales(
                    group_CN.T,
                    bits=bits,
                    group_size=0,
                    symmetric=zero_GN is None,
                    method=ranges,
                    importance=square_K[index : index + size],
                )
                scale_GN[group] = scale[:, 0]
                if zero_GN is not None and zero is not None:
                    zero_GN[group] = zero[:, 0].float()
            value_N = torch.div(moved_KN[index], scale_GN[group], out=values_KN[index]).round_()
            if zero_GN is None:
                value_N.clamp_(low, high)
                rounded_N = value_N * scale_GN[group]
            else:
                value_N.add_(zero_GN[group]).clamp_(low, high)
                rounded_N = (value_N - zero_GN[group]).mul_(scale_GN[group])
            error_N = torch.sub(weight_KN[index], rounded_N, out=errors_CN[index - start])
            moved_KN[index + 1 : stop].addcmul_(
                factor_KK[index, index + 1 : stop, None], error_N[None]
            )
        moved_KN[stop:].addmm_(factor_KK[start:stop, stop:].T, errors_CN)
    values_NK = torch.empty_like(grid.values)
    values_NK[:, order_K] = values_KN.T.to(values_NK.dtype)
    return QuantTensor(
        values=values_NK,
        scale=scale_GN.T.contiguous(),
        zero=None if grid.zero is None or zero_GN is None else zero_GN.T.to(grid.zero.dtype),
        bits=bits,
        group_size=size,
    )


def _expected(weight_KN: Tensor, moved_KN: Tensor, factor_KK: Tensor, group: slice) -> Tensor:
    """What a group's columns [C, N] would be moved to, were none of them rounded.

    Of the errors before the group each column has its share in `moved_KN`. That of the columns
    before it in the group is missing, which would have moved as well.
    """
    start_CN = weight_KN[group]
    moves_CN: Tensor = torch.linalg.solve_triangular(
        factor_KK[group, group].T, moved_KN[group] - start_CN, upper=False, unitriangular=True
    )
    return start_CN + moves_CN


def rows_of(is_first_N: Tensor, first: QuantTensor, second: QuantTensor) -> QuantTensor:
    """The rows of `first` where so marked, else those of `second`."""
    is_first_N1 = is_first_N[:, None]
    zero = None
    if first.zero is not None and second.zero is not None:
        zero = torch.where(is_first_N1, first.zero, second.zero)
    return QuantTensor(
        values=torch.where(is_first_N1, first.values, second.values),
        scale=torch.where(is_first_N1, first.scale, second.scale),
        zero=zero,
        bits=first.bits,
        group_size=first.group_size,
    )
