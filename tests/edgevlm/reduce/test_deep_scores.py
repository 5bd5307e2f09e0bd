"""Scorers of the decoder: torch and the twin agree, and both do what the papers say."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from edgevlm.reduce.piece import Scorer
from edgevlm.reduce.scorers.attention_delta import AttentionDelta
from edgevlm.reduce.scorers.contrast import Contrast
from edgevlm.reduce.scorers.text_attention import TextAttention
from edgevlm.reduce.view import View
from tests.edgevlm.reduce.views import HEAD, call_view, in_torch

# Shares of a softmax, float32 against float64.
TOLERANCE = 1e-6
# Quotients of two shares, each good to six digits.
RATIO = 1e-4

SCORERS: dict[str, tuple[Scorer, float]] = {
    **{
        f"{layer} {query} {rope}": (
            TextAttention(layer=layer, query=query, rope=rope),
            RATIO if rope == "corrected" else TOLERANCE,
        )
        for layer, query, rope in (
            ("own", "last", "on"),
            ("own", "text", "on"),
            ("own", "question", "off"),
            ("own", "raters", "corrected"),
            ("previous", "last", "off"),
            ("previous", "words", "on"),
            ("previous", "last", "corrected"),
        )
    },
    "best of the heads": (TextAttention(query="question", top_heads=2), TOLERANCE),
    "a share of the heads": (
        TextAttention(query="raters", rope="corrected", top_heads=0.6),
        RATIO,
    ),
    "one head": (TextAttention(rope="off", top_heads=0.01), TOLERANCE),
    "attention delta": (AttentionDelta(), TOLERANCE),
    "attention delta to words": (AttentionDelta(weight=0.1, query="words"), TOLERANCE),
    "contrast": (Contrast(), RATIO),
    "contrast, not rotated": (Contrast(layer="previous", rope="off"), RATIO),
}


def scored(scorer: Scorer, view: View[np.ndarray]) -> np.ndarray:
    """What torch makes of a view."""
    found: np.ndarray = scorer.torch(in_torch(view)).numpy()
    return found


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (3, 1)], ids=["grouped", "own keys", "one key"])
@pytest.mark.parametrize("num_pictures", [1, 2])
@pytest.mark.parametrize("name", SCORERS)
def test_torch_is_the_twin(name: str, num_pictures: int, heads: tuple[int, int]) -> None:
    scorer, tolerance = SCORERS[name]
    view = call_view(num_pictures=num_pictures, heads=heads, seed=len(name))
    want = scorer.numpy(view)
    assert want.shape == (num_pictures, 20)
    assert float(want.std()) > 100 * TOLERANCE
    np.testing.assert_allclose(scored(scorer, view), want, atol=tolerance, rtol=tolerance)


def test_what_stands_behind_the_prompt_is_not_looked_at() -> None:
    """Rows of padding, or of an answer, may hold anything."""
    view = call_view(num_pictures=2)
    call = view.call
    assert call is not None
    end = int(call.last[0]) + 1
    probes = {}
    for name, probe in view.probes.items():
        q, k = probe.q.copy(), probe.k.copy()
        q[:, end:], k[:, end:] = 50.0, -50.0
        probes[name] = dataclasses.replace(probe, q=q, k=k)
    rows = call.rows.copy()
    rows[:, end:] = 99.0
    other = dataclasses.replace(view, probes=probes, call=dataclasses.replace(call, rows=rows))
    for scorer, _ in SCORERS.values():
        # The same sums of the same numbers: what is added to them is zero.
        np.testing.assert_array_equal(scored(scorer, other), scored(scorer, view))


def weighed(view: View[np.ndarray], **weights: np.ndarray) -> View[np.ndarray]:
    """The view with other weights of its rows."""
    assert view.call is not None
    call = dataclasses.replace(view.call, weights={**view.call.weights, **weights})
    return dataclasses.replace(view, call=call)


def test_raters_that_are_all_words_are_the_question() -> None:
    view = call_view()
    assert view.call is not None
    view = weighed(view, raters=view.call.weights["question"])
    one, other = (TextAttention(query=query) for query in ("raters", "question"))
    np.testing.assert_array_equal(scored(one, view), scored(other, view))


def test_a_weight_counts_as_often() -> None:
    """A row of weight two asks as two rows do."""
    view = call_view()
    assert view.call is not None
    last = int(view.call.last[0])
    length = view.call.rows.shape[1]
    twice, once = np.zeros((2, 1, length), np.float32)
    twice[0, last], twice[0, last - 1] = 2.0, 1.0
    both = scored(TextAttention(query="text"), weighed(view, text=twice))
    alone = []
    for row in (last, last - 1):
        once[:] = 0
        once[0, row] = 1.0
        alone.append(scored(TextAttention(query="text"), weighed(view, text=once)))
    np.testing.assert_allclose(both, (2 * alone[0] + alone[1]) / 3, atol=TOLERANCE, rtol=0)


def test_correction_where_all_rows_stand_alike_scales_alone() -> None:
    """SparseVLM 2: with one position for all, rotation pulls nowhere."""
    view = call_view()
    assert view.call is not None
    probe = view.probes["own"]
    assert probe.cos is not None
    assert probe.sin is not None
    cos, sin = (np.tile(table[5], (len(table), 1)) for table in (probe.cos, probe.sin))
    alike = dataclasses.replace(probe, cos=cos, sin=sin)
    view = dataclasses.replace(view, probes={"own": alike})
    corrected, plain = (scored(TextAttention(rope=rope), view) for rope in ("corrected", "off"))
    # Every row that is seen gets an even share of what is free of content.
    seen = int(view.call.last[0]) + 1
    np.testing.assert_allclose(corrected, plain * seen, atol=0, rtol=RATIO)


def test_the_best_heads_are_those_that_look_at_pictures() -> None:
    """One head sees the pictures, three look at the text before them."""
    view = call_view(heads=(4, 4))
    assert view.call is not None
    probe = view.probes["own"]
    last, (start,) = int(view.call.last[0]), view.call.starts
    k = probe.k.reshape(1, -1, 4, HEAD).copy()
    q = probe.q.reshape(1, -1, 4, HEAD).copy()
    q[0, last] = 1.0
    k[0, :start] = 3.0
    k[0, :start, 2] = -3.0
    flat = dataclasses.replace(probe, q=q.reshape(probe.q.shape), k=k.reshape(probe.k.shape))
    view = dataclasses.replace(view, probes={"own": flat})
    (best,) = scored(TextAttention(rope="off", top_heads=1), view)
    logits = k[0, : last + 1, 2] @ q[0, last, 2] * probe.scale
    shares = np.exp(logits - logits.max())
    want = (shares / shares.sum())[start : start + 20]
    np.testing.assert_allclose(best, want, atol=TOLERANCE, rtol=0)
    assert best.sum() > 0.5


def test_less_attention_is_no_loss() -> None:
    """CATP: what the layer behind looks at less scores as what it does not look at."""
    view = call_view()
    now, before = (scored(TextAttention(layer=layer), view) for layer in ("own", "previous"))
    found = scored(AttentionDelta(weight=0.0), view)
    np.testing.assert_allclose(found, np.maximum(now - before, 0), atol=TOLERANCE, rtol=0)
    assert (found == 0).any()
    swapped = dataclasses.replace(
        view, probes={"own": view.probes["previous"], "previous": view.probes["own"]}
    )
    assert not (found * scored(AttentionDelta(weight=0.0), swapped)).any()


def test_likeness_to_the_question() -> None:
    """Two layers that attend alike leave the cosine alone."""
    view = call_view()
    assert view.call is not None
    probe = view.probes["own"]
    view = dataclasses.replace(view, probes={"own": probe, "previous": probe})
    mean = view.call.rows[0][view.call.weights["question"][0] > 0].mean(0).astype(np.float64)
    tokens = view.tokens.features.astype(np.float64)
    want = tokens @ mean / np.linalg.norm(tokens, axis=-1) / np.linalg.norm(mean)
    found = scored(AttentionDelta(weight=2.0), view)
    np.testing.assert_allclose(found, 2 * want, atol=TOLERANCE, rtol=0)


def test_a_prompt_that_asks_in_general_has_no_contrast() -> None:
    """CARVE: where both looks are one, all tokens are worth the same."""
    view = call_view()
    assert view.call is not None
    text = np.zeros_like(view.call.weights["text"])
    text[0, view.call.last] = 1.0
    found = scored(Contrast(), weighed(view, text=text))
    np.testing.assert_allclose(found, 1.0, atol=RATIO, rtol=0)


@pytest.mark.parametrize(
    ("scorer", "kinds", "back", "here"),
    [
        (TextAttention(), set(), False, True),
        (TextAttention(layer="previous", query="raters"), {"raters"}, True, False),
        (AttentionDelta(query="words"), {"words"}, True, True),
        (Contrast(), {"text"}, False, True),
        (Contrast(layer="previous"), {"text"}, True, False),
    ],
)
def test_what_a_scorer_asks_for(scorer: Any, kinds: set[str], back: bool, here: bool) -> None:
    assert (scorer.asks, scorer.looks_back, scorer.looks_here) == (kinds, back, here)
