"""Harm and noise of single sites: swapped in, measured, and taken out again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.evidence.measures import logits_agreement
from edgevlm.model.quantized import QuantLinear
from edgevlm.model.vlm import Vlm
from edgevlm.progress import Silent
from edgevlm.quant.calibrate import CalibrationCase
from edgevlm.quant.harm import (
    extra_bytes,
    logits_along,
    site_harms,
    site_noises,
    split_alike,
    swapped,
)
from tests.edgevlm.calibrated import quantized, samples_of
from tests.edgevlm.tiny import drawn, tiny_spec

OPTIONS = {
    "vision": {"scheme": "w8a8", "activations": "static"},
    "projector": "w8a16",
    "decoder": "w4a16",
    "prefill": "w8a16",
    "head": "w8a16",
}


@pytest.fixture(scope="module")
def cases() -> list[CalibrationCase]:
    return samples_of(tiny_spec(), 2)


@pytest.fixture
def pair(cases: list[CalibrationCase]) -> tuple[Vlm, Vlm]:
    """A float model, and the same quantized."""
    model = drawn(tiny_spec())
    quantized(model, OPTIONS, cases)
    return drawn(tiny_spec()), model


def tensors(model: Vlm) -> dict[str, Tensor]:
    """Every weight by every name that it has."""
    return dict(model.named_parameters(remove_duplicate=False))


def spoil(model: Vlm, site: str) -> None:
    """Turn the signs of a quantized map."""
    with torch.no_grad():
        model.get_submodule(site).get_parameter("scale").neg_()


def test_a_site_swapped_in_and_out_leaves_the_model_as_it_was(pair: tuple[Vlm, Vlm]) -> None:
    float_model, model = pair
    split_alike(float_model, model)
    for site in model.spec.schemes:
        before, modules = tensors(float_model), dict(float_model.named_modules())
        with swapped(float_model, model, [site]):
            assert float_model.get_submodule(site) is model.get_submodule(site)
            others = [name for name in model.spec.schemes if name != site]
            assert all(isinstance(float_model.get_submodule(o), torch.nn.Linear) for o in others)
        after = tensors(float_model)
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
        assert dict(float_model.named_modules()) == modules


def test_an_error_within_swaps_back_too(pair: tuple[Vlm, Vlm]) -> None:
    float_model, model = pair
    split_alike(float_model, model)
    before = tensors(float_model)
    with (
        pytest.raises(RuntimeError, match="stop"),
        swapped(float_model, model, list(model.spec.schemes)),
    ):
        raise RuntimeError("stop")
    assert all(weight is before[name] for name, weight in tensors(float_model).items())


def test_a_head_is_swapped_for_both_decoders(pair: tuple[Vlm, Vlm]) -> None:
    float_model, model = pair
    split_alike(float_model, model)
    head = float_model.decoder.head
    with swapped(float_model, model, ["decoder.head"]):
        assert float_model.prefill is not None
        assert float_model.prefill.head is float_model.decoder.head is model.decoder.head
    assert float_model.prefill.head is float_model.decoder.head is head


def test_all_sites_swapped_are_the_quantized_model(
    pair: tuple[Vlm, Vlm], cases: list[CalibrationCase]
) -> None:
    float_model, model = pair
    split_alike(float_model, model)
    want, plain = logits_along(model, cases), logits_along(float_model, cases)
    with swapped(float_model, model, list(model.spec.schemes)):
        found = logits_along(float_model, cases)
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(logits_along(float_model, cases), plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_logits_along_are_those_of_whole_sequences(cases: list[CalibrationCase]) -> None:
    """A row for each token of the answer: the last of the prompt, then all but the last."""
    model = drawn(tiny_spec())
    for case, logits in zip(cases, logits_along(model, cases), strict=True):
        assert logits.shape == (len(case.answer), 96)
        prompt = case.question.prompt
        with torch.no_grad():
            pixels = torch.from_numpy(case.question.feeds[0]["pixels"])
            rows = model.embed(torch.from_numpy(prompt.token_ids), model.encode(pixels)[0])
            answer = model.embedding(torch.tensor(case.answer))[None]
            whole = torch.cat([rows, answer], 1)
            want = model(whole, torch.arange(whole.shape[1]))[0, len(prompt.token_ids) - 1 : -1]
        # The same sums over another number of rows.
        np.testing.assert_allclose(logits, want.numpy(), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "broken",
    ["vision.layers.0.mlp.down", "projector.up", "prefill.layers.1.mlp.up", "decoder.head"],
)
def test_a_broken_site_does_the_most_harm(
    pair: tuple[Vlm, Vlm], cases: list[CalibrationCase], broken: str
) -> None:
    float_model, model = pair
    spoil(model, broken)
    harms = site_harms(float_model, model, cases, Silent())
    assert harms[0].site == broken
    assert harms[0].kl > 5 * harms[1].kl
    assert [harm.kl for harm in harms] == sorted((harm.kl for harm in harms), reverse=True)
    assert {harm.site for harm in harms} == set(model.spec.schemes)


def test_harm_is_the_divergence_of_that_site_alone(
    pair: tuple[Vlm, Vlm], cases: list[CalibrationCase]
) -> None:
    float_model, model = pair
    harms = {harm.site: harm for harm in site_harms(float_model, model, cases, Silent())}
    for site in ("vision.layers.1.attention.qkv", "decoder.layers.0.mlp.up", "decoder.head"):
        alone, plain = drawn(tiny_spec()), drawn(tiny_spec())
        split_alike(alone, model)
        split_alike(plain, model)
        alone.set_submodule(site, model.get_submodule(site))
        if site == "decoder.head":
            assert alone.prefill is not None
            alone.prefill.head = alone.decoder.head
        want = logits_agreement(logits_along(plain, cases), logits_along(alone, cases)).kl
        assert harms[site].kl == pytest.approx(want, rel=1e-9, abs=1e-12)
        rows, columns = model.get_submodule(site).get_parameter("weight").shape
        nbytes = model.spec.schemes[site].weights.nbytes(rows, columns)
        assert harms[site].extra_bytes == 4 * rows * columns - nbytes


def test_a_site_of_exact_weights_does_no_harm(
    pair: tuple[Vlm, Vlm], cases: list[CalibrationCase]
) -> None:
    """The float model has the weights that the integers mean; nor does a layer that none reads.

    The features of this encoder are those of its first layer.
    """
    float_model, model = pair
    site = "prefill.layers.0.mlp.gate"
    split_alike(float_model, model)
    module = model.get_submodule(site)
    assert isinstance(module, QuantLinear)
    float_model.get_submodule(site).weight = torch.nn.Parameter(module.float_weight())
    harms = {harm.site: harm.kl for harm in site_harms(float_model, model, cases, Silent())}
    assert harms[site] < 1e-12
    unread = {name for name in harms if name.startswith("vision.layers.1.")}
    assert {harms[name] for name in unread} == {0.0}
    assert min(kl for name, kl in harms.items() if name not in {site, *unread}) > 1e-7


def test_bytes_of_several_sites_add_up(pair: tuple[Vlm, Vlm]) -> None:
    _, model = pair
    sites = list(model.spec.schemes)
    assert extra_bytes(model, sites) == sum(extra_bytes(model, [site]) for site in sites)
    assert extra_bytes(model, []) == 0


@torch.no_grad()
def test_noise_of_each_site(pair: tuple[Vlm, Vlm], cases: list[CalibrationCase]) -> None:
    """Against outputs written down by hooks, of one site in each part of the model."""
    float_model, model = pair
    noises = {noise.site: noise for noise in site_noises(float_model, model, cases)}
    assert list(noises) == list(model.spec.schemes)
    for site in ("vision.layers.1.mlp.up", "projector.down", "decoder.layers.1.mlp.down"):
        seen = {}
        for name, owner in (("float", float_model), ("quantized", model)):
            calls: list[tuple[Tensor, Tensor]] = []
            handle = owner.get_submodule(site).register_forward_hook(
                lambda _m, inputs, output, calls=calls: calls.append((inputs[0], output))
            )
            logits_along(owner, cases)
            handle.remove()
            seen[name] = calls
        want = torch.cat([out.flatten() for _, out in seen["float"]]).double()
        got = torch.cat([out.flatten() for _, out in seen["quantized"]]).double()
        module = model.get_submodule(site)
        alone = torch.cat([module(x).flatten() for x, _ in seen["float"]]).double()
        signal = want.square().sum()
        for figure, other in (("own_db", alone), ("sqnr_db", got)):
            db = float(10 * torch.log10(signal / (want - other).square().sum()))
            # Sums of squares in float32.
            assert getattr(noises[site], figure) == pytest.approx(db, abs=1e-3)
        rms = float(((want - got).square().sum() / signal).sqrt())
        assert noises[site].rms == pytest.approx(rms, rel=1e-4)
        assert noises[site].scheme == str(model.spec.schemes[site])


def test_nothing_is_left_behind(pair: tuple[Vlm, Vlm], cases: list[CalibrationCase]) -> None:
    float_model, model = pair
    split_alike(float_model, model)
    before = [tensors(float_model), tensors(model)]
    site_noises(float_model, model, cases)
    site_harms(float_model, model, cases, Silent())
    for owner, weights in zip((float_model, model), before, strict=True):
        assert all(weight is weights[name] for name, weight in tensors(owner).items())
        assert not any(part._forward_hooks for part in owner.modules())


def test_an_answer_of_one_token_leaves_the_decoder_for_answers_unused(
    pair: tuple[Vlm, Vlm],
) -> None:
    """Sites that no sample reaches have no noise to tell, and do no harm."""
    float_model, model = pair
    short = samples_of(tiny_spec(), 2, answer=1)
    noises = {noise.site for noise in site_noises(float_model, model, short)}
    unused = {site for site in model.spec.schemes if site.startswith("decoder.layers.")}
    assert noises == set(model.spec.schemes) - unused
    harms = {harm.site: harm.kl for harm in site_harms(float_model, model, short, Silent())}
    assert {harms[site] for site in unused} == {0.0}
