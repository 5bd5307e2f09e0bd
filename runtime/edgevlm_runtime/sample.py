"""Choosing the next token from a row of logits.

A vocabulary has 50,000 to 250,000 entries, so nothing here sorts it: none of the k largest entries
is smaller than the k-th largest of the columns' maxima, with the logits laid out as 64 rows.

After a decode step the caches are cold, and then every numpy function that is called costs 20 us
for its code alone. So numpy does what runs over the whole vocabulary, and plain lists the rest.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from random import Random

import numpy as np

from edgevlm_runtime.engine import Array
from edgevlm_runtime.errors import EngineError, InputError

_ROWS = 64
# Entries whose weights are added up first where all tokens may be drawn.
_BLOCK = 256
# First guess of how many tokens hold the probability mass top_p; it grows until they do.
_NUCLEUS = 64
# Logits are divided by the temperature in float32, where a smaller one would be 0.
_COLDEST = 1e-30

# The exponential of this is 0 in float32, or as good as.
_WEIGHTLESS = -104.0

# V vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to draw: `temperature` 0 is greedy; `top_k` and `top_p` narrow the choice, in this order.

    None means no narrowing. Equal logits are taken by lowest id.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if not 0 <= self.temperature < float("inf"):
            raise InputError(
                f"temperature must be 0 or more, got {self.temperature}", hint="0 is greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(
                f"top_k must be at least 1, got {self.top_k}", hint="leave it out for no limit"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(
                f"top_p must be above 0 and at most 1, got {self.top_p}",
                hint="leave it out for no limit",
            )


class Sampler:
    """Draws tokens; two samplers of one seed draw the same."""

    def __init__(self, sampling: Sampling, seed: int | None = None) -> None:
        """Without a seed, draws differ from run to run."""
        self._sampling = sampling
        self._temperature = max(sampling.temperature, _COLDEST)
        self._random = Random(seed)
        # Made at the first draw that needs them, for the vocabulary that it has.
        self._scratch = np.empty(0, np.float32)
        self._begins = np.empty(0, np.int64)

    def draw(self, logits: Array) -> int:
        """The next token from logits float32 [V]; raises EngineError where they are not finite."""
        best = int(logits.argmax())
        top = float(logits[best])
        # argmax finds a NaN before any number, so one look tells.
        if not math.isfinite(top):
            raise EngineError(
                f"the model gave {top} as a logit (token {best})",
                hint="check the bundle with edgevlm inspect, or compile it without low precision",
            )
        sampling = self._sampling
        if sampling.temperature == 0:
            return best
        if sampling.top_k is not None and sampling.top_k < len(logits):
            likeliest = largest(logits, sampling.top_k)
            weights = self._weights(likeliest, top)
            if sampling.top_p is not None:
                weights = weights[: _nucleus(weights, sampling.top_p * sum(weights))]
        elif sampling.top_p is not None and sampling.top_p < 1:
            likeliest, weights = self._nucleus_of_all(logits, top, sampling.top_p)
        else:
            return self._draw_of_all(logits, top)
        place, _ = _place(weights, self._random.random())
        return likeliest[place][1]

    def _weights(self, entries: Sequence[tuple[float, int]], top: float) -> list[float]:
        """The unnormalised probabilities of some logits."""
        return [math.exp((logit - top) / self._temperature) for logit, _ in entries]

    def _weights_of_all(self, logits: Array, top: float) -> Array:
        """The unnormalised probabilities [V] of all, in an array that the next draw overwrites."""
        if len(self._scratch) != len(logits):
            self._scratch = np.empty(len(logits), np.float32)
            self._begins = np.arange(0, len(logits), _BLOCK)
        weights = np.subtract(logits, top, out=self._scratch)
        weights /= self._temperature
        return np.exp(weights, out=weights)

    def _nucleus_of_all(
        self, logits: Array, top: float, top_p: float
    ) -> tuple[list[tuple[float, int]], list[float]]:
        """The fewest tokens that hold the probability mass, and their probabilities."""
        mass, count = top_p * float(self._weights_of_all(logits, top).sum()), _NUCLEUS
        while True:
            likeliest = largest(logits, count)
            weights = self._weights(likeliest, top)
            size = _nucleus(weights, mass)
            if size <= count or count >= len(logits):
                return likeliest, weights[:size]
            count *= 8

    def _draw_of_all(self, logits: Array, top: float) -> int:
        """A token by its weight: first a block of the vocabulary, then an entry of it."""
        weights = self._weights_of_all(logits, top)
        blocks = np.add.reduceat(weights, self._begins)
        block, share = _place(blocks.tolist(), self._random.random())
        begin = block * _BLOCK
        place, _ = _place(weights[begin : begin + _BLOCK].tolist(), share)
        return begin + place


def entropy(logits: Array) -> float:
    """The entropy in nats of the distribution of logits float32 [V], of which one is finite."""
    # What is further down has no weight in float32, and perhaps is no number to multiply with.
    lower = np.maximum(logits - logits.max(), _WEIGHTLESS)
    weights = np.exp(lower)
    mass = float(weights.sum())
    return max(0.0, math.log(mass) - float(np.dot(weights, lower)) / mass)


def largest(logits: Array, count: int) -> list[tuple[float, int]]:
    """The `count` largest entries with their ids, largest first, equal ones by lowest id."""
    if count >= len(logits):
        ids = np.arange(len(logits))
    else:
        # The largest maxima are as many entries of different columns: a bound from below.
        num_columns = len(logits) // _ROWS
        table = logits[: _ROWS * num_columns].reshape(_ROWS, num_columns)
        sample = np.maximum.reduce(table) if count < num_columns else logits.copy()
        sample.partition(-count)
        ids = (logits >= sample[-count]).nonzero()[0]
    entries = zip(logits[ids].tolist(), ids.tolist(), strict=True)
    # Sorting is stable, so that equal ones stay in the order of their ids.
    return sorted(entries, key=itemgetter(0), reverse=True)[:count]


def _nucleus(weights: Sequence[float], mass: float) -> int:
    """How many of the sorted weights reach the mass: all where none do."""
    return bisect_left(list(accumulate(weights)), mass) + 1


def _place(weights: Sequence[float], share: float) -> tuple[int, float]:
    """The entry in which a share of the whole weight falls, and what share of that entry it is."""
    ends = list(accumulate(weights))
    mass = share * ends[-1]
    # No later than the last entry that has a weight, whatever rounding says.
    place = min(bisect_right(ends, mass), bisect_left(ends, ends[-1]))
    return place, (mass - (ends[place] - weights[place])) / weights[place]
