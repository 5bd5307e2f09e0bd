"""Stages between layers of the decoder: what they leave, and that nothing else changes.

The reference is arithmetic in float64 (`tests.edgevlm.reduce.reference`): whole sequences, no
cache, and stages by their twins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.model.stages import CutModule, Left
from edgevlm.model.vlm import Vlm
from edgevlm.reduce.view import View
from tests.edgevlm.reduce.deep import TOKENS, Asked, asked, deep_spec, deep_stages, model_of, staged
from tests.edgevlm.reduce.reference import Reference, lines_of

# Logits of size 3 behind four layers, float32 against float64.
TOLERANCE = 5e-5
ANSWER = (5, 17, 33)
PICTURES = pytest.mark.parametrize("num_pictures", [1, 2])

METHODS: dict[str, Sequence[int]] = {
    "fastv": (1,),
    "feather": (1, 3),
    "pyramiddrop": (1, 2, 3),
    "duet": (1, 3),
    "sparsevlm": (1, 2, 3),
    "sparsevlm2": (1, 2, 3),
    "dart": (2,),
    "efficientvla": (1,),
    "carve": (2,),
}
STAGES: dict[str, list[dict[str, Any]]] = {
    **{name: deep_stages(name, layers) for name, layers in METHODS.items()},
    "catp": [
        {"at": "decoder", "layer": 2, "score": "attention_delta", "select": "top", "place": "keep"}
    ],
    "recycled twice": [
        {
            "at": "decoder",
            "layer": layer,
            "keep": keep,
            "score": {"text_attention": {"query": "text"}},
            "select": "top",
            "rest": {"recycle": {"share": 0.9, "per_cluster": 2}},
            "place": "repack",
        }
        for layer, keep in ((1, 20), (3, 9))
    ],
    "kept, then counted anew": [
        {"at": "decoder", "layer": 1, "keep": 20, "score": "text_attention", "select": "top"},
        {
            "at": "decoder",
            "layer": 2,
            "keep": 9,
            "score": "text_attention",
            "select": "top",
            "place": "repack",
        },
    ],
}


def cut_model(name: str, keep: float = 0.6) -> Vlm:
    """A model of four layers with the stages of a method."""
    return model_of(staged(deep_spec(), *STAGES[name], keep=keep))


def logits_of(model: Vlm, given: Asked) -> np.ndarray:
    """Logits of the prompt's last row and of the answer's, all in one call."""
    with torch.no_grad():
        found: np.ndarray = model.answer(
            given.rows, given.positions, given.num_prompt, given.pictures
        ).numpy()
    return found


def cuts_seen(model: Vlm, given: Asked) -> list[tuple[CutModule, View[Tensor], Left]]:
    """What every cut was shown in a call, and what it left."""
    seen: list[tuple[CutModule, View[Tensor], Left]] = []
    handles = [
        cut.register_forward_hook(lambda cut, inputs, left: seen.append((cut, inputs[0], left)))
        for cut in model.decoder.cuts
    ]
    logits_of(model, given)
    for handle in handles:
        handle.remove()
    return seen


@PICTURES
@pytest.mark.parametrize("name", STAGES)
def test_logits_are_those_of_the_reference(name: str, num_pictures: int) -> None:
    model = cut_model(name)
    given = asked(model, num_pictures, answer=ANSWER)
    want = Reference(model).run(given)
    assert want.std() > 0.5
    np.testing.assert_allclose(logits_of(model, given), want, atol=TOLERANCE, rtol=0)


@PICTURES
@pytest.mark.parametrize("name", STAGES)
def test_an_answer_goes_on_from_what_was_left(name: str, num_pictures: int) -> None:
    """Token by token over pruned caches, as if all had been computed anew at every step."""
    model = cut_model(name)
    prompt = asked(model, num_pictures).prompt()
    stream = model.greedy(prompt.rows, prompt.positions, prompt.pictures)
    steps = list(islice(stream, 4))
    tokens = [token for token, _ in steps]
    want = Reference(model).run(asked(model, num_pictures, answer=tokens[:-1]))
    got = torch.stack([logits for _, logits in steps]).numpy()
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


@PICTURES
@pytest.mark.parametrize("name", STAGES)
def test_all_tokens_kept_change_no_bit(name: str, num_pictures: int) -> None:
    """I1: neither of the logits nor of the angles of any layer."""
    whole = [{**stage, "keep": TOKENS} for stage in STAGES[name]]
    model, plain = model_of(staged(deep_spec(), *whole)), model_of(deep_spec())
    given = asked(plain, num_pictures, answer=ANSWER)
    with torch.no_grad():
        keys, dense = (one.whole_keys(given.positions) for one in (model, plain))
        got = model.decoder(given.rows, keys, None, given.pictures)
        want = plain.decoder(given.rows, dense, None)
    assert torch.equal(got, want)
    for cut, uncut in zip(keys, dense, strict=True):
        assert torch.equal(cut.angles.cos, uncut.angles.cos)
        assert torch.equal(cut.angles.sin, uncut.angles.sin)


@PICTURES
@pytest.mark.parametrize("name", STAGES)
def test_rows_ascend_and_no_text_is_dropped(name: str, num_pictures: int) -> None:
    """I2 and I3."""
    model = cut_model(name)
    given = asked(model, num_pictures, answer=ANSWER)
    seen = cuts_seen(model, given)
    assert [cut.stage.layer for cut, _, _ in seen] == [s["layer"] for s in STAGES[name]]
    for cut, view, left in seen:
        call, stage = view.call, cut.stage
        assert call is not None
        rows = left.rows.tolist()
        assert rows == sorted(set(rows))
        visual = {int(start) + place for start in call.starts for place in range(stage.count_in)}
        assert set(range(call.rows.shape[1])) - visual <= set(rows)
        for start in call.starts.tolist():
            of_picture = [row for row in rows if start <= row < start + stage.count_in]
            assert len(of_picture) == stage.count_out
        made = stage.rest is not None and stage.extra > 0
        assert (left.tokens is not None) == made


def masked(model: Vlm, given: Asked, gone: Mapping[int, Sequence[int]]) -> np.ndarray:
    """Logits where nothing is taken away, but from some layers on no row sees some rows."""
    reference, lines = Reference(model), lines_of(given)
    hidden = np.zeros(len(lines.x), bool)
    x = lines.x
    for index in range(len(reference.spec.layers)):
        hidden[list(gone.get(index, ()))] = True
        x = reference.layer(index, x, lines.positions, hidden)
    return reference.head(x[given.num_prompt - 1 :])


def dropped_rows(model: Vlm, given: Asked) -> dict[int, list[int]]:
    """Rows of the prompt that go before each layer."""
    left = np.arange(given.rows.shape[1])
    found = {}
    for cut, _, after in cuts_seen(model, given):
        kept = left[after.rows.numpy()]
        assert cut.stage.layer is not None
        found[cut.stage.layer] = sorted(set(left.tolist()) - set(kept.tolist()))
        left = kept
    return found


@PICTURES
@pytest.mark.parametrize(
    "name", ["fastv", "feather", "sparsevlm2", "dart", "efficientvla", "carve", "catp"]
)
def test_dropping_is_masking_where_positions_are_kept(name: str, num_pictures: int) -> None:
    """I5."""
    model = cut_model(name)
    given = asked(model, num_pictures, answer=ANSWER)
    want = masked(model, given, dropped_rows(model, given))
    np.testing.assert_allclose(logits_of(model, given), want, atol=TOLERANCE, rtol=0)


@PICTURES
@pytest.mark.parametrize("name", ["pyramiddrop", "duet"])
def test_dropping_is_no_masking_where_positions_are_counted_anew(
    name: str, num_pictures: int
) -> None:
    """The same tokens, and other distances to them."""
    model = cut_model(name)
    given = asked(model, num_pictures, answer=ANSWER)
    other = masked(model, given, dropped_rows(model, given))
    assert np.abs(logits_of(model, given) - other).max() > 0.1


def test_fastv_scores_by_the_attention_of_the_layer_before() -> None:
    """Card A1: the shares that the layer itself attended with, last row, mean over heads."""
    model = cut_model("fastv")
    given = asked(model, 2).prompt()
    ran: dict[str, Tensor] = {}
    core = model.decoder.layers[0].get_submodule("attention.core")

    def keep(_core: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ran.update(packed=inputs[0], out=output)

    handle = core.register_forward_hook(keep)
    ((cut, view, _),) = cuts_seen(model, given)
    handle.remove()

    reference = Reference(model)
    attention = reference.spec.layers[0].attention
    packed = ran["packed"][0].double().numpy()
    ends = [attention.q_width, attention.q_width + attention.kv_width]
    q, k, v = (part.reshape(len(packed), -1, 16) for part in np.split(packed, ends, 1))
    positions = given.positions.numpy().astype(float)
    q, k = reference.turned(q, positions), reference.turned(k, positions)
    k, v = np.repeat(k, 2, 1), np.repeat(v, 2, 1)
    logits = np.einsum("thd,shd->hts", q, k) * attention.scale
    logits[:, np.triu(np.ones(logits.shape[1:], bool), 1)] = -np.inf
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    # These are the shares that the layer made its output of.
    out = np.einsum("hts,shd->thd", shares, v).reshape(len(packed), -1)
    np.testing.assert_allclose(ran["out"][0].numpy(), out, atol=1e-5, rtol=0)

    assert cut.stage.score is not None
    scores = cut.stage.score.torch(view).numpy()
    places = given.starts[:, None] + np.arange(TOKENS)
    np.testing.assert_allclose(scores, shares[:, -1].mean(0)[places], atol=1e-5, rtol=0)


def test_words_without_silent_ones_are_the_question() -> None:
    """DUET's salient words, where every word is salient."""
    stages = deep_stages("duet", (1, 3))
    salient = [{**stage, "score": {"text_attention": {"query": "words"}}} for stage in stages]
    model = model_of(staged(deep_spec(), *stages))
    other = model_of(staged(deep_spec(), *salient))
    given = asked(model, 2, answer=ANSWER)
    loud = Asked(
        rows=given.rows,
        positions=given.positions,
        starts=given.starts,
        weights={**given.weights, "words": given.weights["question"]},
        num_prompt=given.num_prompt,
    )
    np.testing.assert_array_equal(logits_of(model, given), logits_of(other, loud))
    assert np.abs(logits_of(model, given) - logits_of(other, given)).max() > 0.01


def test_raters_are_the_words_that_get_more_than_an_even_share() -> None:
    model = cut_model("sparsevlm")
    for num_pictures in (1, 2):
        for seed in range(5):
            given = asked(model, num_pictures, seed=seed)
            rated = given.pictures.with_raters(given.rows, TOKENS).weights["raters"][0].numpy()
            want = lines_of(given).weights["raters"]
            np.testing.assert_array_equal(rated, want)
            assert 0 < rated.sum() < given.weights["question"].sum()


@pytest.mark.parametrize("num_words", [1, 3])
def test_words_that_are_looked_at_alike_all_ask(num_words: int) -> None:
    """One word alone gets an even share, and so do equal ones: none gets more."""
    model = cut_model("sparsevlm")
    given = asked(model, 1).prompt()
    question = np.zeros_like(given.weights["question"])
    question[-num_words:] = 1.0
    rows = given.rows.clone()
    rows[:, -num_words:] = rows[:, -1:]
    alike = Asked(
        rows=rows,
        positions=given.positions,
        starts=given.starts,
        weights={**given.weights, "question": question},
        num_prompt=given.num_prompt,
    )
    rated = alike.pictures.with_raters(rows, TOKENS).weights["raters"][0].numpy()
    np.testing.assert_array_equal(rated, question)
    assert np.isfinite(logits_of(model, alike)).all()


def test_the_last_norm_is_not_folded_where_a_stage_looks_at_it() -> None:
    spec = deep_spec(tied=False)
    plain = dict(model_of(staged(spec, *STAGES["fastv"], keep=0.6)).norm_consumers())
    pivots = dict(model_of(staged(spec, *STAGES["dart"], keep=0.6)).norm_consumers())
    assert plain["decoder.norm"] == ("decoder.head",)
    assert plain.keys() - pivots.keys() == {"decoder.norm"}
