"""rotate: rows and values are those of the model times an orthogonal matrix; outputs stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgevlm.cache import StageCache
from edgevlm.errors import PassError
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes import FoldNorms, Quantize, Rotate, run_pass, run_passes, stages
from edgevlm.quant.rotate import hadamard
from tests.edgevlm.calibrated import context, samples_of
from tests.edgevlm.passes.odd import RMS_SPECS, SPECS, inputs_of, logits_of, nearest
from tests.edgevlm.quant.slow import Floats, float64
from tests.edgevlm.tiny import drawn, tiny_spec


def folded(spec: VlmSpec) -> Vlm:
    """A model whose norms have weights of one, but for the last one of a tied decoder."""
    model = drawn(spec)
    run_pass(FoldNorms(), model, context())
    return model


def rotation(size: int, seed: int = 0) -> Floats:
    return float64(hadamard(size, seed=seed))


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("spec", RMS_SPECS.values(), ids=RMS_SPECS.keys())
def test_outputs_stay(spec: VlmSpec, heads: bool) -> None:
    model, cases = folded(spec), samples_of(spec)
    before = logits_of(model, cases)
    assert before.std() > 0.5, "logits must be large enough to show a difference"
    seen = context(cases, probe=lambda changed: logits_of(changed, cases))
    run_pass(Rotate(components=("vision", "decoder"), heads=heads), model, seen)
    # float32 roundings in another order; 1e-4 is the bound of every lossless pass.
    torch.testing.assert_close(
        logits_of(model, cases), before, rtol=0, atol=1e-4 * float(before.std())
    )


def test_values_of_layer_norm_decoders_are_rotated() -> None:
    """Each head with values of its own, and biases: attention averages, and a mean has them too."""
    spec = SPECS["plain"]
    model, cases = drawn(spec), samples_of(spec)
    before = logits_of(model, cases)
    values = inputs_of(model, cases, ["decoder.layers.0.attention.out"])
    vision = Rotate(components=("vision",), heads=True)
    run_pass(vision, model, context(probe=lambda changed: logits_of(changed, cases)))
    unchanged = inputs_of(model, cases, ["decoder.layers.0.attention.out"])
    np.testing.assert_allclose(*unchanged.values(), *values.values(), atol=1e-4)
    torch.testing.assert_close(
        logits_of(model, cases), before, rtol=0, atol=1e-4 * float(before.std())
    )


@pytest.mark.parametrize("spec", RMS_SPECS.values(), ids=RMS_SPECS.keys())
def test_rows_and_values_are_rotated(spec: VlmSpec) -> None:
    before, after, cases = folded(spec), folded(spec), samples_of(spec)
    run_pass(Rotate(heads=True), after, context(seed=3))
    layer = spec.decoder.layers[0].attention
    # Norms of one pass a rotation on; what reads them is given rotated rows.
    reads = "decoder.layers.0.attention.qkv", "decoder.layers.0.mlp.up", "decoder.head"
    out, down = "decoder.layers.0.attention.out", "decoder.layers.0.mlp.down"
    old = inputs_of(before, cases, [*reads, out, down])
    new = inputs_of(after, cases, [*reads, out, down])
    if spec.decoder.tied:
        old["decoder.head"] /= float64(before.decoder.norm.get_parameter("weight"))
    turn = rotation(spec.decoder.width, seed=3)
    np.testing.assert_allclose(turn @ turn.T, np.eye(len(turn)), atol=1e-12)
    for site in reads:
        np.testing.assert_allclose(new[site], old[site] @ turn, atol=1e-4)
    heads = old[out].reshape(-1, layer.num_heads, layer.head_dim)
    turned = heads @ rotation(layer.head_dim, seed=3)
    np.testing.assert_allclose(new[out], turned.reshape(old[out].shape), atol=1e-4)
    np.testing.assert_allclose(new[down], old[down], atol=1e-4)
    embedding = float64(before.embedding.get_parameter("weight"))
    np.testing.assert_allclose(
        float64(after.embedding.get_parameter("weight")), embedding @ turn, atol=1e-6
    )


def test_a_tied_head_gets_weights_of_its_own() -> None:
    model = folded(tiny_spec())
    assert model.decoder.head.weight is model.embedding.weight
    change = run_pass(Rotate(), model, context())
    assert model.decoder.head.weight is not model.embedding.weight
    assert not model.spec.decoder.tied
    assert not model.decoder.spec.tied
    assert torch.equal(model.decoder.norm.weight, torch.ones(64))
    assert change.measures == {"mixed_channels": 64, "head_mib": 4 * 96 * 64 / 2**20}
    model.tie()
    assert model.decoder.head.weight is not model.embedding.weight


def test_matches() -> None:
    model = folded(tiny_spec(tied=False))
    change = run_pass(Rotate(components=("vision", "decoder"), heads=True), model, context())
    rows = ["attention.out", "mlp.down"], ["attention.qkv", "mlp.gate", "mlp.up"]
    writes, reads = (
        [f"decoder.layers.{index}.{site}" for index in range(2) for site in sites] for sites in rows
    )
    values = [
        f"vision.layers.{index}.attention.{site}" for index in range(2) for site in ("qkv", "out")
    ]
    assert change.sites == (
        "embedding", "decoder.head", "projector.down", *writes, *reads, *values
    )  # fmt: skip
    assert change.skipped == {
        "vision": "its rows become features, which are compared with the reference's channel by "
        "channel"
    }
    assert change.measures == {"mixed_channels": 64, "head_mib": 0}


def test_the_seed_decides() -> None:
    weights = []
    for seed in (0, 0, 1):
        model = folded(tiny_spec())
        run_pass(Rotate(), model, context(seed=seed))
        weights.append(model.decoder.layers[0].mlp.up.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=0.01)


def test_an_outlier_spreads_over_all_channels() -> None:
    """What rotations are for: one channel takes the range of every row of weights, and no more."""
    model = folded(tiny_spec())
    with torch.no_grad():
        # An unnormalised row of one channel can only come in by what reads it.
        model.decoder.layers[0].mlp.up.weight[:, 7] *= 20
    before = float64(model.decoder.layers[0].mlp.up.weight)
    run_pass(Rotate(), model, context())
    after = float64(model.decoder.layers[0].mlp.up.weight)
    np.testing.assert_allclose((before**2).sum(axis=1), (after**2).sum(axis=1), rtol=1e-5)
    lost = [float(((w - nearest(w, 0)) ** 2).sum()) for w in (before, after)]
    assert lost[1] < 0.7 * lost[0]


def test_is_kept_with_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "WORTH_KEEPING_S", -1.0)
    cache = StageCache(root=tmp_path)
    steps = (FoldNorms(), Rotate(heads=True))
    made = [stages.run_stages(steps, drawn(tiny_spec()), context(), cache, "key") for _ in range(2)]
    (first, first_applied), (second, second_applied) = made
    assert second_applied == first_applied
    assert second.spec == first.spec
    assert not second.spec.decoder.tied
    weights = dict(first.named_parameters())
    assert "decoder.head.weight" in weights
    assert weights.keys() == dict(second.named_parameters()).keys()
    for name, weight in weights.items():
        assert torch.equal(weight, second.get_parameter(name)), name


def test_plan() -> None:
    foresight = Rotate(heads=True).foresee(tiny_spec(), context())
    assert foresight.spec == replace(tiny_spec(), decoder=replace(tiny_spec().decoder, tied=False))
    assert foresight.effect == (
        "rows of 64 in the decoder are rotated; the head is no longer the embedding and takes 0.0 "
        "MiB more as float32; values of heads are rotated in decoder"
    )
    untied = tiny_spec(tied=False)
    foresight = Rotate().foresee(untied, context())
    assert foresight.spec == untied
    assert foresight.effect == "rows of 64 in the decoder are rotated"


def test_needs_folded_norms() -> None:
    model = drawn(tiny_spec())
    before = model.embedding.weight.clone()
    with pytest.raises(PassError) as caught:
        run_pass(Rotate(), model, context())
    assert str(caught.value) == (
        "rotate at decoder.layers.0.norm1: the weight of the norm is not one, and a rotation does "
        "not commute with it\n  hint: run fold_norms first"
    )
    assert torch.equal(model.embedding.weight, before)


def test_the_last_norm_of_an_untied_decoder_is_folded_too() -> None:
    model = folded(tiny_spec(tied=False))
    with torch.no_grad():
        model.decoder.norm.weight[0] = 2.0
    with pytest.raises(PassError) as caught:
        run_pass(Rotate(), model, context())
    assert str(caught.value) == (
        "rotate at decoder.norm: the weight of the norm is not one, and a rotation does not "
        "commute with it\n  hint: run fold_norms first"
    )


def test_refuses_norms_that_subtract_a_mean() -> None:
    with pytest.raises(PassError) as caught:
        run_passes([FoldNorms(), Rotate()], drawn(SPECS["plain"]), context())
    assert str(caught.value) == (
        "rotate at decoder.layers.0.norm1: the norm subtracts a mean, which a rotation does not "
        "keep\n  hint: leave decoder out of components"
    )


def test_refuses_to_rotate_nothing() -> None:
    with pytest.raises(PassError) as caught:
        Rotate(components=("vision",)).foresee(tiny_spec(), context())
    assert str(caught.value) == (
        "rotate: it names nothing to rotate: rows of the vision encoder stay\n"
        "  hint: add decoder to components, or set heads: true"
    )


def test_comes_before_quantize() -> None:
    spec = Quantize.model_validate({"embedding": "int8"}).foresee(tiny_spec(), context()).spec
    with pytest.raises(PassError) as caught:
        Rotate().foresee(spec, context())
    assert str(caught.value) == (
        "rotate: the maps that it rotates are quantized already\n  hint: put rotate before quantize"
    )
