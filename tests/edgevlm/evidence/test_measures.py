"""The measures of evidence against slow, obvious versions."""

from __future__ import annotations

import numpy as np
import pytest

from edgevlm.evidence.measures import (
    TIE_MARGIN,
    logits_agreement,
    margins,
    tensor_agreement,
    token_agreement,
)


def test_tensor_agreement_over_samples_of_different_shape() -> None:
    want = [np.array([[3.0, 4.0]], np.float32), np.array([0.0, 12.0, 0.0], np.float32)]
    got = [np.array([[3.0, 4.5]], np.float32), np.array([0.0, 12.0, 1.0], np.float32)]
    measured = tensor_agreement(want, got)
    flat_want, flat_got = np.array([3, 4, 0, 12, 0.0]), np.array([3, 4.5, 0, 12, 1.0])
    assert measured.max_error == 1.0
    assert measured.std == pytest.approx(flat_want.std(), abs=1e-12)
    assert measured.cosine == pytest.approx(
        flat_want @ flat_got / np.sqrt(flat_want @ flat_want) / np.sqrt(flat_got @ flat_got),
        abs=1e-12,
    )
    assert measured.relative_error == pytest.approx(1.0 / flat_want.std(), abs=1e-12)


def test_logits_agreement_against_loops() -> None:
    random = np.random.default_rng(0)
    want = [
        random.normal(size=(2, 7)).astype(np.float32) * 3,
        random.normal(size=(3, 7)).astype(np.float32),
    ]
    got = [rows + random.normal(size=rows.shape).astype(np.float32) * 0.1 for rows in want]
    measured = logits_agreement(want, got)
    kl = []
    for p_row, q_row in zip(np.concatenate(want), np.concatenate(got), strict=True):
        p = np.exp(p_row.astype(np.float64)) / np.exp(p_row.astype(np.float64)).sum()
        q = np.exp(q_row.astype(np.float64)) / np.exp(q_row.astype(np.float64)).sum()
        kl.append(sum(p[i] * np.log(p[i] / q[i]) for i in range(7)))
    # Both sides are float64 sums of seven terms.
    assert measured.kl == pytest.approx(np.mean(kl), abs=1e-12)
    assert measured.rows == 5
    assert measured.argmax == np.mean(
        [
            a.argmax() == b.argmax()
            for a, b in zip(np.concatenate(want), np.concatenate(got), strict=True)
        ]
    )


def test_a_flip_below_the_margin_is_a_tie() -> None:
    want = np.array([[1.0, 1.0 + TIE_MARGIN / 2, 0.0], [1.0, 2.0, 0.0]], np.float64)
    got = np.array([[1.1, 1.0, 0.0], [2.0, 1.0, 0.0]], np.float64)
    measured = logits_agreement([want.astype(np.float64)], [got])
    assert (measured.ties, measured.flips, measured.argmax) == (1, 1, 0.0)


def test_margins_are_distances_of_the_two_best() -> None:
    assert margins(np.array([[5.0, 1.0, 4.5], [0.0, -1.0, -3.0]])).tolist() == [0.5, 1.0]


def test_token_agreement_counts_ties_where_answers_part() -> None:
    want = [[1, 2, 3], [1, 2, 3], [4, 5], [6]]
    margin = [np.ones(3), np.array([1.0, TIE_MARGIN / 2, 1.0]), np.ones(2), np.ones(1)]
    got = [[1, 2, 3], [1, 9, 9], [4, 6], [6, 7]]
    measured = token_agreement(want, margin, got)
    assert (measured.answers, measured.identical, measured.ties, measured.flips) == (4, 1, 1, 2)
    assert measured.figures == {"token_agreement": 0.5, "flips": 2.0}
