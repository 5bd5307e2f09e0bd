"""How far a grid reaches: scales and zeros of weights, and the observer of activations.

The smallest and the largest number give a grid that clips nothing. A smaller one clips a few
numbers and rounds all others more finely; where that pays is found by percentiles or by searching
for the least squared error. Every range contains zero, so zero is always a number of the grid.
"""

# N outputs, K inputs, G groups of W columns each

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edgevlm.errors import PassError
from edgevlm.quant.affine import group_spans, integer_range, positive, storage_dtype

RangeMethod = Literal["minmax", "percentile", "mse", "mse_signed"]
"""`mse_signed` also tries negative scales of symmetric grids, which reach one step farther up than
down. Kernels that only multiply by the scale take them (`MatMulNBits`); compilers of NPUs and
TensorRT ask for positive ones."""

# Shares of the widest scale that a search tries, by bits: a fine grid has little to gain.
NUM_RATIOS = 24
LEAST_RATIO = {2: 0.2, 3: 0.3, 4: 0.3}
LEAST_RATIO_OF_MANY_BITS = 0.7

# Numbers that a search handles at once: few enough to stay in cache.
CHUNK = 1 << 18

NUM_BINS = 8192
# What a histogram's reach starts with, before any number but zero is seen: 2^-100.
LEAST_EXPONENT = -100
# Shares of an end that a search over a histogram tries: an outlier may be 256 times too far.
END_RATIOS = torch.logspace(0, -8, 96, base=2, dtype=torch.float64)
MAX_MOVES = 6


def weight_scales(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    method: RangeMethod = "minmax",
    narrow: bool = False,
    percentile: float = 99.9,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scales float32 and zeros (None where symmetric) [N, G] for weights [N, K].

    A symmetric grid uses all of -2^(b-1) to 2^(b-1) - 1, `narrow` leaves out the smallest integer.
    `percentile` is the share of a group, in percent, that lies below its upper end and above its
    lower end. `importance` [K] is what a squared error of a column counts in a search. A group of
    zeros has scale 1.
    """
    num_rows, num_columns = weight.shape
    num_groups = math.ceil(num_columns / group_size) if group_size else 1
    scale_NG = weight.new_empty(num_rows, num_groups, dtype=torch.float32)
    zero_NG = None if symmetric else torch.empty_like(scale_NG, dtype=storage_dtype(bits))
    low, high = integer_range(bits, narrow)
    step = max(1, CHUNK // num_columns)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        for columns, groups, width in group_spans(num_columns, group_size):
            part_NGW = weight[rows, columns].float().unflatten(1, (-1, width))
            ends = _ends(part_NGW, percentile if method == "percentile" else None)
            counts_GW = None
            if importance is not None:
                counts_GW = importance[columns].float().unflatten(0, (-1, width))
            search = _Search(method, bits, low, high, counts_GW)
            if zero_NG is None:
                scale_NG[rows, groups] = _symmetric(part_NGW, ends, search)
            else:
                scale, zero = _asymmetric(part_NGW, ends, search)
                scale_NG[rows, groups] = scale
                zero_NG[rows, groups] = zero.to(zero_NG.dtype)
    return scale_NG, zero_NG


def affine_of(low: float, high: float, *, bits: int, symmetric: bool) -> tuple[float, int]:
    """The scale, a float32, and the zero in the signed domain of a grid from `low` to `high`.

    The range is widened to contain zero; one of no width gets scale 1. A symmetric grid reaches
    the farther end at its largest integer.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"a range from {low} to {high}")
    least, most = integer_range(bits)
    low, high = min(low, 0.0), max(high, 0.0)
    width = max(-low, high) / most if symmetric else (high - low) / (most - least)
    scale = float(positive(torch.tensor(width, dtype=torch.float32)))
    if symmetric:
        return scale, 0
    return scale, min(max(least - round(low / scale), least), most)


def check_finite(x: Tensor, what: str, *, site: str | None, name: str = "quantize") -> None:
    """Raise PassError of the pass `name` where a tensor of a site has NaN or infinities."""
    num_bad = int((~torch.isfinite(x)).sum())
    if num_bad:
        raise PassError(
            f"{num_bad:,} of {x.numel():,} {what} are NaN or infinite",
            name=name,
            site=site,
            hint="check the weights of the checkpoint and the calibration data",
        )


class ActivationRange:
    """A running record of a site's inputs [..., K]: their ends, a histogram, sums of channels.

    The histogram has NUM_BINS equal bins from -reach to reach, where the reach is a power of two
    that doubles as numbers grow, and neighbouring bins then become one. So the counts are exact,
    and the same however the numbers were cut into batches.
    """

    def __init__(self, site: str, *, name: str = "quantize") -> None:
        """Begin an empty record of a site; errors are those of the pass `name`."""
        self.site, self.name = site, name
        self.low, self.high = math.inf, -math.inf
        self.num_rows = 0
        self._absmax_K = torch.zeros(0)
        self._sum_K = torch.zeros(0, dtype=torch.float64)
        self._counts_B = torch.zeros(NUM_BINS, dtype=torch.int64)
        self._exponent = LEAST_EXPONENT

    @property
    def channel_absmax(self) -> Tensor:
        """The largest absolute value of every channel [K], float32."""
        self._check_seen()
        return self._absmax_K

    @property
    def channel_mean(self) -> Tensor:
        """The mean of every channel [K], float32."""
        self._check_seen()
        return (self._sum_K / self.num_rows).float()

    def update(self, x: Tensor) -> None:
        """Record a batch [..., K]; raises PassError where it has NaN or infinities."""
        x_RK = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x_RK):
            return
        low_K, high_K = torch.aminmax(x_RK, dim=0)
        absmax_K = torch.maximum(high_K, -low_K).cpu()
        if not bool(torch.isfinite(absmax_K).all()):
            check_finite(x_RK, "activations", site=self.site, name=self.name)
        if not self.num_rows:
            self._absmax_K = absmax_K
            self._sum_K = torch.zeros_like(absmax_K, dtype=torch.float64)
        self._absmax_K = torch.maximum(self._absmax_K, absmax_K)
        self._sum_K += x_RK.sum(dim=0).cpu()
        self.num_rows += len(x_RK)
        self.low, self.high = min(self.low, float(low_K.min())), max(self.high, float(high_K.max()))
        self._widen(float(absmax_K.max()))
        # Scaling by a power of two is exact, so that no number changes its bin as bins are joined.
        bins_RK = (x_RK * (NUM_BINS / 2 / 2.0**self._exponent)).floor_().add_(NUM_BINS / 2)
        self._counts_B += torch.bincount(bins_RK.int().flatten(), minlength=NUM_BINS).cpu()

    def minmax(self) -> tuple[float, float]:
        """The smallest and the largest number."""
        self._check_seen()
        return self.low, self.high

    def percentile(self, share: float = 99.99) -> tuple[float, float]:
        """Ends, at edges of bins, that leave out at most 100 - `share` percent on either side."""
        low, high = self.minmax()
        allowed = int(int(self._counts_B.sum()) * (100 - share) / 100)
        num_below = int((self._counts_B.cumsum(0) <= allowed).sum())
        num_above = int((self._counts_B.flip(0).cumsum(0) <= allowed).sum())
        half, width = NUM_BINS // 2, self._bin_width
        return max(low, (num_below - half) * width), min(high, (half - num_above) * width)

    def mse(self, *, bits: int, symmetric: bool) -> tuple[float, float]:
        """Ends of the grid that rounds the histogram's numbers with the least squared error.

        One end moves at a time, first the one and then the other, until neither gets better. Ends
        of a symmetric grid move together.
        """
        low, high = self.minmax()
        low, high = min(low, 0.0), max(high, 0.0)
        if symmetric:
            reach = max(-low, high)
            reaches_C = reach * END_RATIOS
            best = int(self._errors(-reaches_C, reaches_C, bits, symmetric=True).argmin())
            return -float(reaches_C[best]), float(reaches_C[best])
        lows_C, highs_C = low * END_RATIOS, high * END_RATIOS
        least = math.inf
        for _ in range(MAX_MOVES):
            before = least
            errors_C = self._errors(lows_C, torch.full_like(lows_C, high), bits, symmetric=False)
            low = float(lows_C[int(errors_C.argmin())])
            errors_C = self._errors(torch.full_like(highs_C, low), highs_C, bits, symmetric=False)
            high, least = float(highs_C[int(errors_C.argmin())]), float(errors_C.min())
            if least >= before:
                break
        return low, high

    @property
    def _bin_width(self) -> float:
        return 2.0 ** (self._exponent + 1) / NUM_BINS

    def _errors(self, lows_C: Tensor, highs_C: Tensor, bits: int, *, symmetric: bool) -> Tensor:
        """The summed squared error of grids from `lows` to `highs` [C], float64."""
        is_used_B = self._counts_B > 0
        middles_B = (torch.arange(NUM_BINS, dtype=torch.float64) - NUM_BINS / 2 + 0.5)[is_used_B]
        x_B = (middles_B * self._bin_width).clamp(self.low, self.high)
        least, most = integer_range(bits)
        if symmetric:
            scale_C1 = (highs_C / most)[:, None]
            zero_C1 = torch.zeros_like(scale_C1)
        else:
            scale_C1 = ((highs_C - lows_C) / (most - least))[:, None]
            scale_C1 = torch.where(scale_C1 > 0, scale_C1, 1.0)
            zero_C1 = (least - (lows_C[:, None] / scale_C1).round()).clamp(least, most)
        scale_C1 = torch.where(scale_C1 > 0, scale_C1, 1.0)
        rounded_CB = ((x_B / scale_C1).round() + zero_C1).clamp(least, most)
        error_CB = (x_B - (rounded_CB - zero_C1) * scale_C1).square()
        # Where a bin holds several steps, its middle says nothing of rounding: a step evenly spread
        # has a twelfth of its square.
        clipped_CB = x_B.clamp((least - zero_C1) * scale_C1, (most - zero_C1) * scale_C1)
        spread_CB = (x_B - clipped_CB).square() + scale_C1.square() / 12
        error_CB = torch.where(scale_C1 < 2 * self._bin_width, spread_CB, error_CB)
        return error_CB @ self._counts_B[is_used_B].double()

    def _widen(self, absmax: float) -> None:
        """Double the reach until it holds `absmax`."""
        exponent = math.frexp(absmax)[1]
        if absmax == 0.0 or exponent <= self._exponent:
            return
        bins = torch.arange(NUM_BINS) - NUM_BINS // 2
        joined = (bins >> min(exponent - self._exponent, 62)) + NUM_BINS // 2
        self._counts_B = torch.zeros_like(self._counts_B).index_add_(0, joined, self._counts_B)
        self._exponent = exponent

    def _check_seen(self) -> None:
        if not self.num_rows:
            raise PassError(
                "calibration never reached it",
                name=self.name,
                site=self.site,
                hint="give samples that use this part of the model, or leave it out with `skip`",
            )


def _ends(part_NGW: Tensor, percentile: float | None) -> tuple[Tensor, Tensor]:
    """The lower and the upper end of every group [N, G], with zero between them."""
    if percentile is None:
        low_NG, high_NG = torch.aminmax(part_NGW, dim=2)
    else:
        shares = part_NGW.new_tensor([1 - percentile / 100, percentile / 100])
        low_NG, high_NG = torch.quantile(part_NGW, shares, dim=2)
    return low_NG.clamp(max=0.0), high_NG.clamp(min=0.0)


@dataclass(frozen=True, slots=True)
class _Search:
    """What a grid is chosen by: integers from `low` to `high`, what columns count [G, W]."""

    method: RangeMethod
    bits: int
    low: int
    high: int
    counts: Tensor | None

    def scale(
        self,
        part_NGW: Tensor,
        widest_NG: Tensor,
        low: Tensor | None = None,
        high: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scale of the least squared error per group, and the squares that it takes away.

        For the integers q of every clipped range, the best scale is <w, q> / <q, q>, and the error
        is <w, w> - <w, q>^2 / <q, q>. Rounding again with that scale can only bring it down.
        `low` and `high` [N, G, 1] are the ends of grids that have zeros.
        """
        counts_GW = self.counts
        counted_NGW = part_NGW if counts_GW is None else part_NGW * counts_GW
        best_NG = torch.zeros_like(widest_NG)
        scale_NG = widest_NG.clone()
        # Numbers of a round, made once: pages for new tensors would take longer than the sums.
        value_NGW, product_NGW = torch.empty_like(part_NGW), torch.empty_like(part_NGW)
        least = LEAST_RATIO.get(self.bits, LEAST_RATIO_OF_MANY_BITS)
        for ratio in torch.linspace(1.0, least, NUM_RATIOS).tolist():
            torch.div(part_NGW, (widest_NG * ratio)[..., None], out=value_NGW).round_()
            if isinstance(low, Tensor) and isinstance(high, Tensor):
                torch.clamp(value_NGW, low, high, out=value_NGW)
            else:
                # The same, at less than half the time.
                value_NGW.clamp_(self.low, self.high)
            product_NG = torch.mul(counted_NGW, value_NGW, out=product_NGW).sum(dim=2)
            torch.mul(value_NGW, value_NGW, out=product_NGW)
            square_NG = (product_NGW if counts_GW is None else product_NGW.mul_(counts_GW)).sum(
                dim=2
            )
            gain_NG = product_NG.square() / square_NG
            is_better = gain_NG > best_NG
            best_NG = torch.where(is_better, gain_NG, best_NG)
            scale_NG = torch.where(is_better, product_NG / square_NG, scale_NG)
        return scale_NG, best_NG


def _symmetric(part_NGW: Tensor, ends: tuple[Tensor, Tensor], search: _Search) -> Tensor:
    """Scales [N, G]; a negative one where that fits better and is allowed."""
    low_NG, high_NG = ends
    widest_NG = positive(torch.maximum(high_NG / search.high, low_NG / search.low))
    if search.method in ("minmax", "percentile"):
        return widest_NG
    scale_NG, gain_NG = search.scale(part_NGW, widest_NG)
    if search.method == "mse_signed":
        widest_NG = positive(torch.maximum(low_NG / -search.high, high_NG / -search.low))
        flipped_NG, flipped_gain_NG = search.scale(-part_NGW, widest_NG)
        scale_NG = torch.where(flipped_gain_NG > gain_NG, -flipped_NG, scale_NG)
    return scale_NG


def _asymmetric(
    part_NGW: Tensor, ends: tuple[Tensor, Tensor], search: _Search
) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N, G], zeros as whole floats."""
    low_NG, high_NG = ends
    scale_NG = positive((high_NG - low_NG) / (search.high - search.low))
    # Shrinking both ends alike leaves the zero where it is.
    zero_NG = (search.low - (low_NG / scale_NG).round()).clamp(search.low, search.high)
    if search.method in ("mse", "mse_signed"):
        low, high = (search.low - zero_NG)[..., None], (search.high - zero_NG)[..., None]
        scale_NG, _ = search.scale(part_NGW, scale_NG, low, high)
    return scale_NG, zero_NG
