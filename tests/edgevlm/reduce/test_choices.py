"""Selectors against what their papers say of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgevlm.document import Complaint
from edgevlm.reduce.choices.cover import Cover
from edgevlm.reduce.choices.dpp import Dpp
from edgevlm.reduce.choices.facility import Facility
from edgevlm.reduce.choices.spread import Spread
from edgevlm.reduce.choices.top import Top
from edgevlm.reduce.lattice import lattice_rows, spaced_rows
from edgevlm.reduce.piece import Choice
from edgevlm.reduce.view import numpy_unit
from tests.edgevlm.reduce.early import GRID, NUM_TOKENS, Both, as_torch, views

# Sums of 24 to 29 numbers up to one, in float32.
TOLERANCE = 1e-5


def rows_of(choice: Choice, both: Both, count: int) -> list[int]:
    """What a selector keeps of the first picture."""
    return choice.torch(both.torch, None, count)[0].tolist()


def picks(choice: Choice, both: Both) -> Iterator[tuple[list[int], int]]:
    """What was kept before each pick, and the pick: a greedy selector adds one token a step."""
    kept: list[int] = []
    for count in range(1, NUM_TOKENS + 1):
        (new,) = set(rows_of(choice, both, count)) - set(kept)
        assert len(kept) == count - 1
        yield kept, new
        kept = [*kept, new]


@pytest.mark.parametrize("choice", [Cover(), Facility(), Facility(weight=0.0), Dpp(), Spread()])
def test_all_of_all_are_kept(choice: Choice) -> None:
    assert rows_of(choice, views(), NUM_TOKENS) == list(range(NUM_TOKENS))


def test_the_first_spread_token_is_the_loneliest() -> None:
    for seed in range(5):
        both = views(seed=seed)
        rows = numpy_unit(both.numpy.tokens.features[0].astype(np.float64))
        apart = 1 - rows @ rows.T + 9 * np.eye(NUM_TOKENS)
        assert rows_of(Spread(), both, 1) == [int(apart.min(1).argmax())]


def test_spread_tokens_lie_ever_nearer() -> None:
    both = views(seed=1)
    rows = numpy_unit(both.numpy.tokens.features[0].astype(np.float64))
    apart = 1 - rows @ rows.T
    nearest = [apart[new, kept].min() for kept, new in picks(Spread(), both) if kept]
    assert (np.diff(nearest) < TOLERANCE).all()


def test_twins_are_spread_last() -> None:
    both = views(seed=2)
    features = both.numpy.tokens.features.copy()
    features[:, 1::2] = features[:, ::2]
    kept = rows_of(Spread(), both.tokens(features=features), NUM_TOKENS // 2)
    assert sorted(row // 2 for row in kept) == list(range(NUM_TOKENS // 2))


def covered(both: Both, choice: Cover, kept: list[int]) -> float:
    """How well tokens cover question and picture, by the definition."""
    view = both.numpy
    tokens, words, seen = (
        numpy_unit(x[0].astype(np.float64))
        for x in (view.tokens.features, view.question, view.encoded)
    )
    likeness = np.exp(words @ tokens.T / choice.text_temperature)
    weights = view.asked[choice.query][0] / view.asked[choice.query][0].sum()
    to_text = likeness / likeness.sum(1, keepdims=True) * weights[:, None]
    likeness = np.exp(seen @ seen.T / choice.picture_temperature)
    of_picture = choice.alpha * likeness / likeness.sum(1, keepdims=True) / len(seen)
    best = np.concatenate([to_text, of_picture])[:, kept]
    return float(best.max(1, initial=0.0).sum())


def test_what_covers_gains_ever_less() -> None:
    choice, both = Cover(text_temperature=0.1), views(seed=3)
    gains = [
        covered(both, choice, [*kept, new]) - covered(both, choice, kept)
        for kept, new in picks(choice, both)
    ]
    assert (np.diff(gains) < TOLERANCE).all()
    assert min(gains) > -TOLERANCE


def test_rows_of_padding_cover_nothing() -> None:
    both = views(seed=4)
    view = both.numpy
    padded = replace(
        view,
        question=np.concatenate([view.question, np.full_like(view.question, 9.0)], 1),
        asked={kind: np.concatenate([w, w * 0], 1) for kind, w in view.asked.items()},
    )
    for choice in (Cover(), Facility(), Dpp(), Cover(query="text", alpha=0.0)):
        longer = choice.torch(as_torch(padded), None, 7)
        assert torch.equal(longer, choice.torch(both.torch, None, 7))


def test_much_alpha_covers_the_picture_alone() -> None:
    both = views(seed=5)
    other = replace(both.torch, question=both.torch.question.flip(1))
    choice = Cover(alpha=1e6)
    assert torch.equal(choice.torch(both.torch, None, 6), choice.torch(other, None, 6))
    choice = Cover(alpha=0.01)
    assert not torch.equal(choice.torch(both.torch, None, 6), choice.torch(other, None, 6))


def served(both: Both, choice: Facility, kept: list[int]) -> float:
    """How well tokens serve all, and answer, by the definition."""
    view = both.numpy
    rows = numpy_unit(view.tokens.features[0].astype(np.float64))
    weights = view.asked[choice.query][0] / view.asked[choice.query][0].sum()
    mean = numpy_unit(weights @ view.question[0].astype(np.float64))
    best = ((1 + rows @ rows[kept].T) / 2).max(1, initial=0.0)
    return float(best.sum() + choice.weight * ((1 + rows[kept] @ mean) / 2).sum())


@pytest.mark.parametrize("weight", [0.0, 0.7, 30.0])
def test_every_facility_is_worth_most(weight: float) -> None:
    choice, both = Facility(weight=weight), views(seed=6)
    for kept, new in picks(choice, both):
        worth = [served(both, choice, [*kept, row]) for row in range(NUM_TOKENS) if row not in kept]
        # Of two tokens that are each other's best, either is worth as much: without the question,
        # rounding may choose.
        assert served(both, choice, [*kept, new]) > max(worth) - TOLERANCE * max(1.0, weight)


def test_without_weight_facilities_know_no_question() -> None:
    both = views(seed=7)
    other = replace(both.torch, question=both.torch.question.flip(1))
    for weight, is_same in ((0.0, True), (30.0, False)):
        choice = Facility(weight=weight)
        found = torch.equal(choice.torch(both.torch, None, 6), choice.torch(other, None, 6))
        assert found is is_same


def test_the_first_dpp_token_is_most_like_the_question() -> None:
    for seed in range(5):
        both = views(seed=seed)
        view = both.numpy
        rows, words = numpy_unit(view.tokens.features[0]), numpy_unit(view.question[0])
        likeness = rows @ words.T @ view.asked["question"][0]
        assert rows_of(Dpp(), both, 1) == [int(likeness.argmax())]
        # The one that is least like it has a row of zeros in the kernel.
        assert int(likeness.argmin()) not in rows_of(Dpp(), both, NUM_TOKENS - 5)


def test_a_dpp_keeps_no_twins() -> None:
    both = views(seed=8)
    features = both.numpy.tokens.features.copy()
    features[:, 1::2] = features[:, ::2]
    kept = rows_of(Dpp(), both.tokens(features=features), 9)
    assert len({row // 2 for row in kept}) == 9
    assert all(row % 2 == 0 for row in kept)


def test_a_lattice_is_kept_first() -> None:
    scores = torch.arange(NUM_TOKENS, dtype=torch.float32)[None]
    for count in (4, 9, NUM_TOKENS):
        kept = Top(lattice=3).torch(views().torch, scores, count)[0].tolist()
        lattice = lattice_rows(GRID, 3)
        assert set(lattice) <= set(kept)
        best = [row for row in range(NUM_TOKENS) if row not in lattice]
        assert kept == sorted([*lattice, *best[len(lattice) - count :]])


def test_a_uniform_share_is_kept_first() -> None:
    scores = torch.arange(NUM_TOKENS, dtype=torch.float32)[None]
    kept = Top(uniform_share=0.5).torch(views().torch, scores, 8)[0].tolist()
    spaced = spaced_rows(GRID, NUM_TOKENS, 4)
    assert kept == sorted([*spaced, *[row for row in range(NUM_TOKENS) if row not in spaced][-4:]])


def test_a_lattice_that_is_too_large_is_refused() -> None:
    with pytest.raises(Complaint) as error:
        Top(lattice=2).check(GRID, 5)
    assert (error.value.message, error.value.hint) == (
        "a lattice of every 2 of 4 x 6 tokens holds 6, and 5 are kept",
        "keep more tokens, or widen the lattice",
    )
