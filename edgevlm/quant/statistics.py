"""What the input of a linear map is like over the calibration samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from edgevlm.quant.gptq import Hessian
from edgevlm.quant.options import SchemeOptions
from edgevlm.quant.ranges import ActivationRange
from edgevlm.quant.spec import Scheme

__all__ = ["Statistics", "Wanted", "wanted_of"]

METHODS_ON_PRODUCTS = frozenset({"gptq"})
ANSWER_TIMES = 10
"""How many rows of a prompt a row that predicts an answer counts for. Most samples are a hundred
rows of picture and a handful of answer, and answers are what a user sees: counted alike, products
know next to nothing of them. More than this many times changes little (docs/quantization.md)."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which statistics a site needs: ranges, products of columns, means."""

    ranges: bool = False
    products: bool = False
    means: bool = False

    def __or__(self, other: Wanted) -> Wanted:
        """What either needs."""
        return Wanted(
            self.ranges or other.ranges,
            self.products or other.products,
            self.means or other.means,
        )

    def __bool__(self) -> bool:
        """Whether anything is needed."""
        return self.ranges or self.products or self.means


def wanted_of(scheme: Scheme, options: SchemeOptions, bias_correction: bool) -> Wanted:
    """What a scheme needs to know of its input."""
    activations = scheme.activations
    return Wanted(
        ranges=activations is not None and activations.is_static,
        products=options.method in METHODS_ON_PRODUCTS,
        means=bias_correction,
    )


class Statistics:
    """Statistics of one input [..., K]; raises PassError at NaN or infinity, naming the site."""

    def __init__(
        self, site: str, columns: int, wanted: Wanted, *, answers: Sequence[int] = ()
    ) -> None:
        """Start with nothing seen.

        `answers` has the number of rows that predict an answer, the last ones of each input, one
        input after the other; inputs beyond them have none.
        """
        self._answers = iter(answers)
        self._has_means = wanted.means
        self.range = ActivationRange(site) if wanted.ranges or wanted.means else None
        self.products = Hessian(columns, site=site) if wanted.products else None

    def update(self, x: Tensor) -> None:
        """Look at an input."""
        rows = x.flatten(0, -2)
        if self.range is not None:
            self.range.update(rows)
        answers = next(self._answers, 0)
        if self.products is not None:
            self.products.update(rows)
            if answers:
                self.products.update(rows[-answers:], ANSWER_TIMES - 1)

    @property
    def mean(self) -> Tensor | None:
        """The mean input [K], float32; raises PassError where the samples never got there."""
        return self.range.channel_mean if self._has_means and self.range is not None else None
