"""Layers that some visual tokens skip: which pass, what becomes of the others, and of nothing else.

The reference is arithmetic in float64 (`tests.edgevlm.reduce.reference`), which routes, sorts and
weighs row by row.
"""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from edgevlm.model.learned import check_weights, learned_weights, teach
from edgevlm.model.skips import Passing, SkipModule
from edgevlm.model.spec import RopeSpec
from edgevlm.model.vlm import Vlm
from edgevlm.reduce.extent import Extent
from edgevlm.reduce.learned import drawn
from edgevlm.reduce.piece import Skip, known
from edgevlm.reduce.scorers.router import Router
from edgevlm.reduce.view import View
from tests.edgevlm.reduce.deep import TOKENS, Asked, asked, deep_spec, model_of, skipping, staged
from tests.edgevlm.reduce.reference import Reference
from tests.edgevlm.reduce.test_deep_cuts import logits_of

# Logits of size 3 behind four layers, float32 against float64.
TOLERANCE = 5e-5
ANSWER = (5, 17, 33)
PICTURES = pytest.mark.parametrize("num_pictures", [1, 2])


def every(skip: str, **more: Any) -> dict[str, Any]:
    """A stage whose tokens skip layers 1 and 3 of four."""
    return skipping(skip, {"every": {"step": 2}}, **more)


STAGES: dict[str, dict[str, Any]] = {
    "p-MoD": skipping("reweighted", "cosine"),
    "VideoLLM-MoD": every("gated", keep=0.2, score={"router": {"bias": False}}),
    "all layers but the first": skipping("gated", {"every": {"step": 1}}, keep=9),
    "a large gain": every({"reweighted": {"gain": 0.9}}, keep=5),
    "all pass, and are weighed": every("gated", keep=TOKENS),
}


def skip_model(name: str) -> Vlm:
    """A model of four layers with a stage, whose routers are drawn."""
    return model_of(staged(deep_spec(), STAGES[name]))


def skips_seen(model: Vlm, given: Asked) -> list[tuple[SkipModule, View[Tensor], Passing]]:
    """What every stage was shown in a call, and what it said."""
    seen: list[tuple[SkipModule, View[Tensor], Passing]] = []
    handles = [
        skip.register_forward_hook(lambda skip, inputs, out: seen.append((skip, inputs[0], out)))
        for skip in model.decoder.skips
    ]
    logits_of(model, given)
    for handle in handles:
        handle.remove()
    return seen


@PICTURES
@pytest.mark.parametrize("name", STAGES)
def test_logits_are_those_of_the_reference(name: str, num_pictures: int) -> None:
    model = skip_model(name)
    given = asked(model, num_pictures, answer=ANSWER)
    want = Reference(model).run(given)
    assert want.std() > 0.5
    np.testing.assert_allclose(logits_of(model, given), want, atol=TOLERANCE, rtol=0)


@PICTURES
@pytest.mark.parametrize("name", STAGES)
def test_an_answer_goes_on_from_what_passed(name: str, num_pictures: int) -> None:
    """Token by token over caches of what passed, as if all had been computed anew."""
    model = skip_model(name)
    prompt = asked(model, num_pictures).prompt()
    steps = list(islice(model.greedy(prompt.rows, prompt.positions, prompt.pictures), 4))
    tokens = [token for token, _ in steps]
    want = Reference(model).run(asked(model, num_pictures, answer=tokens[:-1]))
    got = torch.stack([logits for _, logits in steps]).numpy()
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


@PICTURES
def test_a_prompt_has_a_decoder_of_its_own(num_pictures: int) -> None:
    """The prompt by one, the answer by the other, over the same caches."""
    model = skip_model("p-MoD")
    given = asked(model, num_pictures, answer=ANSWER)
    want = logits_of(model, given)
    model.split_phases()
    np.testing.assert_allclose(logits_of(model, given), want, atol=TOLERANCE, rtol=0)


def set_routers(model: Vlm, row: float, bias: float) -> None:
    """Every router the same."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".learned.router." in name:
                weight.fill_(bias if name.endswith("bias") else row)


@PICTURES
@pytest.mark.parametrize(("skip", "bias"), [("reweighted", 0.0), ("gated", 1.0)])
def test_all_tokens_at_weight_one_change_no_bit(skip: str, bias: float, num_pictures: int) -> None:
    """I1, and card C4: a product with one is exact, and sums are taken in the same order."""
    model = model_of(staged(deep_spec(), every(skip, keep=TOKENS)))
    set_routers(model, 0.0, bias)
    plain = model_of(deep_spec())
    given = asked(plain, num_pictures, answer=ANSWER)
    np.testing.assert_array_equal(logits_of(model, given), logits_of(plain, given))


def test_text_alone_passes_all_layers_whole() -> None:
    plain = model_of(deep_spec())
    given = asked(plain, 0, answer=ANSWER)
    for name in STAGES:
        model = skip_model(name)
        with torch.no_grad():
            got = model.answer(given.rows, given.positions, given.num_prompt)
        np.testing.assert_array_equal(got.numpy(), logits_of(plain, given))


def test_training_begins_with_the_published_router() -> None:
    """p-MoD's says nothing; the ordinary one is as large as its rows make it."""
    extent = Extent(tokens=36, kept=9, width=64)
    nothing = Router().weights(extent)
    assert {name: weight.shape for name, weight in nothing.items()} == {
        "row": (64, 1),
        "bias": (1,),
    }
    assert not any(drawn(name, weight).any() for name, weight in nothing.items())
    (weight,) = Router(bias=False, start="normal").weights(extent).values()
    assert 0.8 / 8 < drawn("row", weight).std() < 1.2 / 8


@PICTURES
@pytest.mark.parametrize("name", ["p-MoD", "VideoLLM-MoD", "a large gain"])
def test_a_token_that_skips_is_left_alone(name: str, num_pictures: int) -> None:
    """Bit for bit where it is not weighed, else one product; and no text skips (I2, I3)."""
    model = skip_model(name)
    given = asked(model, num_pictures, answer=ANSWER)
    told = {skip.stage.layer: (skip, view, out) for skip, view, out in skips_seen(model, given)}
    keys = model.whole_keys(given.positions)
    with torch.no_grad():
        rows = model.decoder.entered(given.rows, None, given.pictures)
        for layer in range(4):
            x, rows = rows.x[0], model.decoder.step(layer, rows, keys)
            if layer not in told:
                continue
            skip, view, passing = told[layer]
            assert passing.rows is not None
            assert skip.stage.score is not None
            passed = passing.rows.tolist()
            assert passed == sorted(set(passed))
            # A gain of zero for what is not weighed: ones, exactly.
            gain = getattr(skip.stage.skip, "gain", 0.0)
            weights = gain * skip.stage.score.torch(skip.taught(view)).tanh() + 1.0
            skipped = 0
            for picture, start in enumerate(given.starts.tolist()):
                for place in range(TOKENS):
                    row = start + place
                    is_alone = torch.equal(rows.x[0, row], x[row] * weights[picture, place])
                    assert is_alone == (row not in passed)
                    skipped += is_alone
            assert skipped == num_pictures * (TOKENS - skip.stage.count_out)
            assert len(passed) == len(x) - skipped


@pytest.mark.parametrize("name", ["p-MoD", "VideoLLM-MoD"])
def test_every_layer_chooses_among_all_tokens_anew(name: str) -> None:
    """Tokens that skipped one layer pass another."""
    model = skip_model(name)
    seen = skips_seen(model, asked(model, 1).prompt())
    chosen = [set(passing.rows.tolist()) for _, _, passing in seen if passing.rows is not None]
    assert len(chosen) == len(model.decoder.skips)
    assert chosen[-1] - chosen[0]


def test_pictures_choose_apart() -> None:
    """What passes of the first picture is the same with and without a second."""
    model = skip_model("VideoLLM-MoD")
    both = asked(model, 2).prompt()
    end = int(both.starts[1])
    alone = Asked(
        rows=both.rows[:, :end],
        positions=both.positions[:end],
        starts=both.starts[:1],
        weights={kind: x[:end] for kind, x in both.weights.items()},
        num_prompt=end,
    )
    for (_, _, ours), (_, _, theirs) in zip(
        skips_seen(model, both), skips_seen(model, alone), strict=True
    ):
        assert ours.rows is not None
        assert theirs.rows is not None
        assert [row for row in ours.rows.tolist() if row < end] == theirs.rows.tolist()


def test_positions_of_three_axes_go_with_their_rows() -> None:
    """M-RoPE: what passes turns as it stands, wherever that is."""
    spec = deep_spec()
    rope = RopeSpec(inv_freq=spec.decoder.rope.inv_freq, sections=(2, 3, 3))
    spec = dataclasses.replace(spec, decoder=dataclasses.replace(spec.decoder, rope=rope))
    model, plain = model_of(staged(spec, STAGES["p-MoD"])), model_of(deep_spec())
    state = {name: x for name, x in model.state_dict().items() if ".skips." not in name}
    assert state.keys() == plain.state_dict().keys()
    given = asked(model, 2, answer=ANSWER)
    with torch.no_grad():
        got = model.answer(
            given.rows, given.positions.expand(3, -1), given.num_prompt, given.pictures
        )
    # On all axes alike they are those of one.
    want = Reference(model).run(given)
    np.testing.assert_allclose(got.numpy(), want, atol=TOLERANCE, rtol=0)


@PICTURES
@pytest.mark.parametrize("name", ["p-MoD", "VideoLLM-MoD"])
def test_choosing_without_sorting_changes_no_bit(name: str, num_pictures: int) -> None:
    """The form for processors that lack TopK."""
    spec = staged(deep_spec(), STAGES[name])
    assert spec.reduction is not None
    ((grid, stages),) = spec.reduction.stages
    dense = tuple(dataclasses.replace(stage, dense=True) for stage in stages)
    other = dataclasses.replace(spec.reduction, stages=((grid, dense),), dense=True)
    given = asked(model_of(spec), num_pictures, answer=ANSWER)
    got = logits_of(model_of(dataclasses.replace(spec, reduction=other)), given)
    np.testing.assert_array_equal(got, logits_of(model_of(spec), given))


def test_a_file_holds_every_router_by_its_layer(tmp_path: Path) -> None:
    """Taught, a model is the one that was saved."""
    model = skip_model("p-MoD")
    weights = dict(learned_weights(model))
    assert sorted(weights) == [
        f"decoder.skips.{number}.learned.router.{part}"
        for number in range(3)
        for part in ("bias", "row")
    ]
    file = tmp_path / "routers.safetensors"
    save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, file)
    other = skip_model("p-MoD")
    set_routers(other, 0.0, 0.0)
    given = asked(model, 1, answer=ANSWER)
    assert np.abs(logits_of(other, given) - logits_of(model, given)).max() > 0.01
    check_weights(model.spec, file)
    teach(other, file)
    np.testing.assert_array_equal(logits_of(other, given), logits_of(model, given))


@pytest.mark.parametrize("name", sorted(known(Skip)))
def test_weights_in_torch_are_those_of_the_twin(name: str) -> None:
    scores = 3 * np.random.default_rng(0).standard_normal((2, 50)).astype(np.float32)
    piece: Any = known(Skip)[name]()
    ours, theirs = piece.torch(torch.from_numpy(scores)), piece.numpy(scores.astype(np.float64))
    for part in ("attention", "mlp", "skipped"):
        got, want = getattr(ours, part), getattr(theirs, part)
        assert (got is None) == (want is None)
        if got is not None:
            np.testing.assert_allclose(got.numpy(), want, atol=1e-6, rtol=0)
