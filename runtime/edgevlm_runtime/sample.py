"""Choosing the next token from a row of logits.

A vocabulary has 50,000 to 250,000 entries and there are milliseconds per token, so nothing here
sorts it. Logits are looked at as 64 rows of columns: none of the k largest entries is smaller than
the k-th largest of the columns' maxima, and an inverse-CDF draw first chooses a column by its sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgevlm_runtime.engine import Array
from edgevlm_runtime.errors import EngineError, InputError

_ROWS = 64
# First guess of how many tokens hold the probability mass top_p; it grows until they do.
_NUCLEUS = 64


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
        self._random = np.random.default_rng(seed)

    def draw(self, logits: Array) -> int:
        """The next token from logits [V]; raises EngineError where they are not finite."""
        best = int(logits.argmax())
        # argmax finds a NaN before any number, so one look tells.
        if not np.isfinite(logits[best]):
            raise EngineError(
                f"the model gave {logits[best]} as a logit (token {best})",
                hint="check the bundle with edgevlm inspect, or compile it without low precision",
            )
        if self._sampling.temperature == 0:
            return best
        ids, weights = self._choice(logits, logits[best])
        return _drawn(ids, weights, self._random.random())

    def _choice(self, logits: Array, best: np.floating) -> tuple[Array | None, Array]:
        """The tokens to choose among (None: all) and their unnormalised probabilities."""
        sampling = self._sampling
        if sampling.top_k is not None and sampling.top_k < len(logits):
            ids = largest(logits, sampling.top_k)
            weights = np.exp((logits[ids] - best) / sampling.temperature)
            if sampling.top_p is None:
                return ids, weights
            size = _nucleus(weights, sampling.top_p * weights.sum())
            return ids[:size], weights[:size]
        weights = np.exp((logits - best) / np.float32(sampling.temperature))
        if sampling.top_p is None or sampling.top_p == 1:
            return None, weights
        mass, size = sampling.top_p * weights.sum(dtype=np.float64), _NUCLEUS
        while True:
            ids = largest(logits, min(size, len(logits)))
            enough = _nucleus(weights[ids], mass)
            if enough < size:
                return ids[:enough], weights[ids[:enough]]
            size *= 8


def largest(logits: Array, count: int) -> Array:
    """Ids of the `count` largest entries, largest first, equal ones by lowest id."""
    num_columns = len(logits) // _ROWS
    if count >= len(logits):
        ids = np.arange(len(logits))
    else:
        # The largest maxima are as many entries of different columns: a bound from below.
        table = logits[: _ROWS * num_columns].reshape(_ROWS, num_columns)
        sample = table.max(axis=0) if count < num_columns else logits
        ids = np.flatnonzero(logits >= np.partition(sample, -count)[-count])
    values = logits[ids]
    return ids[np.lexsort((ids, -values))][:count]


def _nucleus(weights: Array, mass: float) -> int:
    """How many of the sorted weights reach the mass; one more than there are if none do."""
    return int(np.searchsorted(np.cumsum(weights, dtype=np.float64), mass)) + 1


def _drawn(ids: Array | None, weights: Array, uniform: float) -> int:
    """The token at a fraction of the whole weight."""
    if ids is not None:
        return int(ids[_at(np.cumsum(weights, dtype=np.float64), uniform)])
    num_columns = len(weights) // _ROWS
    table = weights[: _ROWS * num_columns].reshape(_ROWS, num_columns)
    rest = weights[_ROWS * num_columns :]
    # Columns, then single entries of the rest.
    cumulated = np.cumsum(np.concatenate([table.sum(axis=0), rest]), dtype=np.float64)
    place = _at(cumulated, uniform)
    if place >= num_columns:
        return _ROWS * num_columns + place - num_columns
    before = cumulated[place - 1] if place else 0.0
    column = np.cumsum(table[:, place], dtype=np.float64)
    left = uniform * cumulated[-1] - before
    row = min(int(np.searchsorted(column, left, side="right")), int(column.argmax()))
    return row * num_columns + place


def _at(cumulated: Array, uniform: float) -> int:
    """The entry in which a fraction of the last value falls."""
    place = int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
    return min(place, len(cumulated) - 1)
