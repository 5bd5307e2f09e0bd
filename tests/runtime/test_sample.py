"""Sampling against plain numpy over the sorted vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgevlm_runtime.errors import EngineError
from edgevlm_runtime.sample import Sampler, Sampling, largest


def logits_of(size: int, seed: int = 0, scale: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def probabilities(logits: NDArray[Any], sampling: Sampling) -> NDArray[np.float64]:
    """Sort everything, cut by k, then by p, as the definitions say."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / sampling.temperature)
    if sampling.top_k is not None:
        weights[sampling.top_k :] = 0
    weights /= weights.sum()
    if sampling.top_p is not None:
        before = np.cumsum(weights) - weights
        weights[before >= sampling.top_p] = 0
    result = np.zeros(len(logits))
    result[order] = weights / weights.sum()
    return result


@settings(deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=700),
    st.integers(1, 20),
)
def test_largest_entries_with_ties(values: list[int], count: int) -> None:
    logits = np.array(values, np.float32)
    wanted = np.lexsort((np.arange(len(logits)), -logits))[:count]
    np.testing.assert_array_equal([id for _, id in largest(logits, count)], wanted)


@pytest.mark.parametrize("size", [1, 63, 64, 1000, 49_152, 50_001])
@pytest.mark.parametrize("count", [1, 5, 50, 900])
def test_largest_entries_of_a_vocabulary(size: int, count: int) -> None:
    logits = logits_of(size)
    wanted = np.lexsort((np.arange(size), -logits))[:count]
    np.testing.assert_array_equal([id for _, id in largest(logits, count)], wanted)


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = np.zeros(500, np.float32)
    logits[[70, 300]] = 2
    assert Sampler(Sampling()).draw(logits) == 70
    assert Sampler(Sampling(temperature=1.0, top_k=1), 0).draw(logits) == 70


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=1.0, top_k=7),
        Sampling(temperature=2.0, top_k=30, top_p=0.8),
        Sampling(temperature=1.0, top_p=0.5),
        Sampling(temperature=4.0, top_p=0.95),
        Sampling(temperature=1.0, top_p=1.0),
        Sampling(temperature=1.0, top_k=5000),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """Frequencies of 5,000 draws; never a token that the cut excludes."""
    logits = logits_of(1000)
    wanted = probabilities(logits, sampling)
    sampler = Sampler(sampling, seed=1)
    counts = np.bincount([sampler.draw(logits) for _ in range(5_000)], minlength=1000)
    assert counts[wanted == 0].sum() == 0
    # Total variation of 5,000 draws over m likely tokens is about sqrt(m / (2 pi 5,000)).
    likely = (wanted > 1e-5).sum()
    bound = 1.5 * (likely / (2 * np.pi * 5_000)) ** 0.5 + 0.01
    assert np.abs(counts / 5_000 - wanted).sum() / 2 < bound


def test_extremes_of_the_uniform_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last token of positive weight, also in the last, shorter rows."""
    logits = np.full(64 * 3 + 5, -np.inf, np.float32)
    logits[[2, 100, 195]] = 0.0
    drawn = set()
    for uniform in (0.0, 0.2, 0.5, np.nextafter(1.0, 0.0)):
        sampler = Sampler(Sampling(temperature=1.0), 0)
        monkeypatch.setattr(sampler, "_random", _Fixed(uniform))
        drawn.add(sampler.draw(logits))
    assert drawn == {2, 100, 195}


class _Fixed:
    def __init__(self, uniform: float) -> None:
        self._uniform = uniform

    def random(self) -> float:
        return self._uniform


@pytest.mark.parametrize(("bad", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_logits_that_are_not_finite(bad: float, shown: str) -> None:
    logits = np.full(100, bad, np.float32) if bad < 0 else logits_of(100)
    logits[40] = bad
    token = 0 if bad < 0 else 40
    with pytest.raises(EngineError) as error:
        Sampler(Sampling()).draw(logits)
    assert str(error.value) == (
        f"the model gave {shown} as a logit (token {token})\n"
        "  hint: check the bundle with edgevlm inspect, or compile it without low precision"
    )
