"""Pivots, and what is relevant or different: torch, the twin, and the definition by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from edgevlm.reduce.choices.pivots import Pivots
from edgevlm.reduce.choices.relevant_diverse import RelevantDiverse
from edgevlm.reduce.choices.top import Top
from edgevlm.reduce.view import View
from tests.edgevlm.reduce.views import HEAD, call_view, in_torch

PICTURES = pytest.mark.parametrize("num_pictures", [1, 2])


def pivoted(choice: Pivots, view: View[np.ndarray], count: int) -> list[list[int]]:
    """What torch keeps, which is what the twin keeps."""
    kept = choice.torch(in_torch(view), None, count).numpy()
    np.testing.assert_array_equal(kept, choice.numpy(view, None, count))
    assert kept.shape[1] == count
    found: list[list[int]] = kept.tolist()
    assert all(rows == sorted(set(rows)) for rows in found)
    return found


@PICTURES
@pytest.mark.parametrize("choice", [Pivots(), Pivots(visual=1, text=0), Pivots(visual=2, text=6)])
def test_pivots_in_torch_are_those_of_the_twin(choice: Pivots, num_pictures: int) -> None:
    for seed in range(5):
        view = call_view(num_pictures=num_pictures, seed=seed)
        for count in (1, 3, 8, 13, 20):
            pivoted(choice, view, count)


def normed(view: View[np.ndarray]) -> np.ndarray:
    """Rows of length one behind the last norm, [T, W]."""
    assert view.normed is not None
    rows = view.normed[0].astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_pivot_takes_what_is_least_like_it() -> None:
    """One visual pivot alone: the token of the largest key, and those most unlike it."""
    view = call_view()
    assert view.call is not None
    probe, (start,) = view.probes["previous"], view.call.starts
    tokens = normed(view)[start : start + 20]
    # By hand, with the rotation as products of complex numbers.
    heads = probe.k[0].reshape(-1, probe.num_kv_heads, HEAD).astype(np.float64)
    turns = np.exp(1j * np.arange(len(heads))[:, None] * 10.0 ** -np.arange(3.0))[:, None]
    pairs = (heads[..., :3] + 1j * heads[..., 3:6]) * turns
    sizes = np.abs(pairs.real) + np.abs(pairs.imag)
    sizes = sizes.sum((1, 2)) + np.abs(heads[..., 6:]).sum((1, 2))
    pivot = int(sizes[start : start + 20].argmax())
    order = np.argsort(tokens @ tokens[pivot])
    want = sorted([pivot, *order[:5]])
    assert pivoted(Pivots(visual=1, text=0), view, 6) == [want]


def test_pivots_of_the_question_stand_behind_the_pictures() -> None:
    """Large keys of other rows, of padding or of text before the picture, are no pivots."""
    view = call_view()
    assert view.call is not None
    want = pivoted(Pivots(), view, 12)
    probe = view.probes["previous"]
    k = probe.k.copy()
    k[0, 0], k[0, -1] = 1e3, 1e3
    loud = dataclasses.replace(view, probes={"previous": dataclasses.replace(probe, k=k)})
    assert pivoted(Pivots(), loud, 12) == want


def test_every_pivot_takes_its_share_in_turn() -> None:
    """Two pivots that are alike: the second takes what the first has left."""
    view = call_view()
    assert view.call is not None
    assert view.normed is not None
    (start,), last = view.call.starts, int(view.call.last[0])
    rows = view.normed.copy()
    probe = view.probes["previous"]
    k = np.full_like(probe.k, 0.01)
    # A picture's token and a row of the question have large keys, and are one.
    k[0, start + 4], k[0, last] = 5.0, 4.0
    rows[0, last] = rows[0, start + 4]
    view = dataclasses.replace(
        view, normed=rows, probes={"previous": dataclasses.replace(probe, k=k)}
    )
    tokens = normed(view)[start : start + 20]
    order = [place for place in np.argsort(tokens @ tokens[4]) if place != 4]
    # Seven more: four for the first pivot, three for the second.
    assert pivoted(Pivots(visual=1, text=1), view, 8) == [sorted([4, *order[:7]])]


def test_a_question_of_fewer_rows_than_pivots() -> None:
    view = call_view()
    assert view.call is not None
    question = np.zeros_like(view.call.weights["question"])
    question[0, view.call.last] = 1.0
    weights = {**view.call.weights, "question": question}
    view = dataclasses.replace(view, call=dataclasses.replace(view.call, weights=weights))
    pivoted(Pivots(), view, 15)


def test_what_pivots_ask_for() -> None:
    choice = Pivots()
    assert choice.asks == {"question"}
    assert (choice.looks_back, choice.looks_here, choice.looks_normed) == (True, False, True)
    assert not RelevantDiverse().looks_normed


def scores_of(seed: int, num_pictures: int) -> np.ndarray:
    """Scores of twenty tokens, no two equal."""
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(20) for _ in range(num_pictures)]).astype(np.float32)


@PICTURES
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("key", [1, 4, 30])
def test_relevant_and_diverse_in_torch_are_those_of_the_twin(
    key: int, alpha: float, num_pictures: int
) -> None:
    choice = RelevantDiverse(key=key, alpha=alpha)
    for seed in range(5):
        view = call_view(num_pictures=num_pictures, seed=seed)
        scores = scores_of(seed, num_pictures)
        for count in (1, 2, 9, 20):
            kept = choice.torch(in_torch(view), torch.from_numpy(scores), count).numpy()
            np.testing.assert_array_equal(kept, choice.numpy(view, scores, count))
            assert kept.shape == (num_pictures, count)
            assert (np.diff(kept) > 0).all()


def test_by_relevance_alone() -> None:
    """Alpha of one."""
    view, scores = call_view(), scores_of(0, 1)
    choice = RelevantDiverse(key=3, alpha=1.0)
    for count in (2, 7, 20):
        got = choice.torch(in_torch(view), torch.from_numpy(scores), count)
        want = Top().torch(in_torch(view), torch.from_numpy(scores), count)
        np.testing.assert_array_equal(got.numpy(), want.numpy())


def test_half_by_relevance_and_half_by_difference() -> None:
    """By hand: two key tokens, two more by score, two that are least like both key ones."""
    view, scores = call_view(), scores_of(3, 1)
    order = np.argsort(-scores[0])
    tokens = view.tokens.features[0].astype(np.float64)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    likeness = (tokens @ tokens[order[:2]].T).max(1)
    others = sorted(order[4:], key=lambda place: likeness[place])[:2]
    choice = RelevantDiverse(key=2, alpha=0.5)
    (kept,) = choice.torch(in_torch(view), torch.from_numpy(scores), 6).tolist()
    assert kept == sorted([*order[:4].tolist(), *map(int, others)])
