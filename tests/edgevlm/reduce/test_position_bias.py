"""Why rotation has no place in scores: it prefers what stands near the question.

FEATHER's observation (arXiv 2412.13180), for every scorer of attention: queries and keys are all
ones, so nothing distinguishes one visual token from another but where it stands.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgevlm.reduce.choices.top import Top
from edgevlm.reduce.piece import Scorer
from edgevlm.reduce.scorers.attention_delta import AttentionDelta
from edgevlm.reduce.scorers.contrast import Contrast
from edgevlm.reduce.scorers.text_attention import TextAttention
from edgevlm.reduce.seq import Probe, VisSeq
from edgevlm.reduce.view import Call, View
from tests.edgevlm.reduce.views import in_torch

# A LLaVA-1.5: 24 x 24 tokens behind 35 rows, the last row at 650, heads of 128 numbers.
GRID, FIRST, LAST, HEAD = (24, 24), 35, 650, 128
TOKENS = GRID[0] * GRID[1]


def free_view(noise: float = 0.0) -> View[np.ndarray]:
    """Rows without content, or with a little of it."""
    length = LAST + 1
    random = np.random.default_rng(0)
    rows = random.standard_normal((1, length, 8)).astype(np.float32)
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(HEAD // 2) / (HEAD // 2))
    places = FIRST + np.arange(TOKENS)
    text = np.ones((1, length), np.float32)
    text[0, places] = 0
    question = text * (np.arange(length) > places[-1])

    def probe() -> Probe[np.ndarray]:
        keys = 1.0 + noise * random.standard_normal((1, length, HEAD))
        return Probe(
            q=np.ones((1, length, HEAD), np.float32),
            k=keys.astype(np.float32),
            num_heads=1,
            num_kv_heads=1,
            scale=HEAD**-0.5,
            cos=np.cos(angles).astype(np.float32),
            sin=np.sin(angles).astype(np.float32),
        )

    return View(
        tokens=VisSeq(features=rows[:, places], places=np.arange(TOKENS)[None], grid=GRID),
        probes={"own": probe(), "previous": probe()},
        call=Call(
            rows=rows,
            starts=np.array([FIRST]),
            last=np.array([LAST]),
            weights={"text": text, "question": question, "words": question, "raters": question},
        ),
    )


QUERIES = ("last", "text", "question", "words", "raters")
NOT_ROTATED: dict[str, Scorer] = {
    **{f"{query}": TextAttention(query=query, rope="off") for query in QUERIES},
    "previous": TextAttention(layer="previous", rope="off"),
    "best heads": TextAttention(rope="off", top_heads=1),
    "contrast": Contrast(rope="off"),
    # Both layers are pulled alike, and what is the same in both is no news.
    "attention delta": AttentionDelta(weight=0.0),
}


@pytest.mark.parametrize("name", NOT_ROTATED)
def test_without_rotation_all_tokens_score_the_same(name: str) -> None:
    scores = NOT_ROTATED[name].torch(in_torch(free_view())).numpy()
    assert scores.var() <= 1e-14 * max(1.0, float(scores.mean()) ** 2)


@pytest.mark.parametrize("query", QUERIES)
def test_rotated_scores_rise_towards_the_question(query: str) -> None:
    """From quarter to quarter of the picture."""
    view = in_torch(free_view())
    scores = TextAttention(query=query).torch(view).numpy()[0]  # type: ignore[arg-type]
    quarters = scores.reshape(4, -1).mean(1)
    assert (np.diff(quarters) > 0).all()
    assert quarters[3] > 2 * quarters[0]


def test_the_pull_is_that_of_the_angles() -> None:
    """By hand: a product is the sum of the cosines of what the rows turned apart."""
    apart = np.arange(LAST + 1) - LAST
    frequencies = 10000.0 ** (-np.arange(HEAD // 2) / (HEAD // 2))
    products = 2 * np.cos(apart[:, None] * frequencies).sum(1) * HEAD**-0.5
    shares = (np.exp(products) / np.exp(products).sum())[FIRST : FIRST + TOKENS]
    scores = TextAttention().torch(in_torch(free_view())).numpy()[0]
    # Angles of up to 650, in float32.
    np.testing.assert_allclose(scores, shares, atol=1e-6, rtol=0)
    quarters = products[FIRST : FIRST + TOKENS].reshape(4, -1).mean(1)
    assert quarters[3] - quarters[0] > 1.5


def test_corrected_scores_are_even() -> None:
    view = in_torch(free_view())
    scores = TextAttention(rope="corrected", query="last").torch(view).numpy()
    # A quotient of two equal shares of six digits.
    np.testing.assert_allclose(scores, 1.0, atol=1e-4, rtol=0)


def mean_percentile(scorer: Scorer, choice: Top, noise: float) -> float:
    """Where what is kept of a picture stands, from 0 at its beginning to 100 at its end."""
    view = free_view(noise)
    tensors = in_torch(view)
    kept = choice.torch(tensors, scorer.torch(tensors), TOKENS // 4).numpy()
    return float(100 * kept.mean() / (TOKENS - 1))


def test_what_fastv_keeps_lies_at_the_bottom_and_what_feather_keeps_does_not() -> None:
    """Keys with noise of a tenth: FastV keeps the end of the picture, whatever is there."""
    fastv = mean_percentile(TextAttention(layer="previous"), Top(), 0.1)
    feather = mean_percentile(TextAttention(rope="off"), Top(lattice=3), 0.1)
    corrected = mean_percentile(TextAttention(rope="corrected"), Top(), 0.1)
    assert fastv > 75
    assert abs(feather - 50) < 5
    assert abs(corrected - 50) < 8


def test_views_without_content_differ_by_place_alone() -> None:
    """The test's own premise: another order of the rows changes nothing but rotation."""
    view = free_view()
    for probe in view.probes.values():
        assert not np.ptp(probe.q)
        assert not np.ptp(probe.k)
        assert np.ptp(dataclasses.asdict(probe)["cos"]) > 1
