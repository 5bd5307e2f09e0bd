"""smooth: ranges of inputs and weights against loops over the samples; outputs stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgevlm.errors import PassError, RecipeError
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes import Quantize, Smooth, run_pass
from edgevlm.quant.absorb import Absorber, absorbers
from edgevlm.recipe import parse_recipe
from tests.edgevlm.calibrated import context, samples_of
from tests.edgevlm.passes.odd import SPECS, inputs_of, logits_of
from tests.edgevlm.quant.slow import Floats, float64
from tests.edgevlm.tiny import drawn, tiny_spec

ALL = ("vision", "projector", "decoder", "head")


def most_by_channel(absorber: Absorber, size: Floats) -> Floats:
    """The largest of the columns that come from one channel, by loops."""
    out = size.copy()
    for o in range(absorber.outer):
        for i in range(absorber.inner):
            columns = [(o * absorber.times + t) * absorber.inner + i for t in range(absorber.times)]
            out[columns] = size[columns].max()
    return out


def ranges_of(model: Vlm, absorber: Absorber, x: Floats) -> tuple[Floats, Floats]:
    """The ranges of an input's channels, and of the weights that read it."""
    weights = np.concatenate(
        [float64(model.get_submodule(site).get_parameter("weight")) for site in absorber.sites]
    )
    inputs = np.abs(x).max(axis=0)
    return (
        most_by_channel(absorber, inputs),
        most_by_channel(absorber, np.abs(weights).max(axis=0)),
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_outputs_stay(spec: VlmSpec) -> None:
    model, cases = drawn(spec), samples_of(spec)
    before = logits_of(model, cases)
    assert before.std() > 0.5, "logits must be large enough to show a difference"
    seen = context(cases, probe=lambda changed: logits_of(changed, cases))
    change = run_pass(Smooth(), model, seen)
    # float32 roundings in another order; 1e-4 is the bound of every lossless pass.
    torch.testing.assert_close(
        logits_of(model, cases), before, rtol=0, atol=1e-4 * float(before.std())
    )
    assert change.measures["spread_after"] < change.measures["spread_before"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_inputs_are_divided_by_the_ratio_of_the_ranges(spec: VlmSpec, alpha: float) -> None:
    before, after, cases = drawn(spec), drawn(spec), samples_of(spec)
    found, _ = absorbers(spec, ALL)
    run_pass(Smooth(alpha=alpha), after, context(cases))
    sites = [absorber.sites[0] for absorber in found]
    old, new = inputs_of(before, cases, sites), inputs_of(after, cases, sites)
    for absorber, site in zip(found, sites, strict=True):
        inputs, weights = ranges_of(before, absorber, old[site])
        scale = inputs**alpha / weights ** (1 - alpha)
        # float32 through all layers before it.
        np.testing.assert_allclose(new[site], old[site] / scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_half_makes_inputs_and_weights_alike_in_range(spec: VlmSpec) -> None:
    model, cases = drawn(spec), samples_of(spec)
    found, _ = absorbers(spec, ALL)
    run_pass(Smooth(alpha=0.5), model, context(cases))
    seen = inputs_of(model, cases, [absorber.sites[0] for absorber in found])
    for absorber in found:
        inputs, weights = ranges_of(model, absorber, seen[absorber.sites[0]])
        # Rows of values and of `up` are divided as well, which moves the range of some columns.
        if absorber.source.endswith(("qkv", "up")) or "head" in absorber.unit:
            np.testing.assert_allclose(inputs, weights, rtol=1e-3)


def test_matches() -> None:
    model = drawn(tiny_spec())
    cases = samples_of(model.spec, 1)
    change = run_pass(Smooth(components=("vision",)), model, context(cases))
    assert change.sites == tuple(
        f"vision.layers.{index}.{site}"
        for index in range(2)
        for site in ("norm1", "attention.qkv", "attention.out", "norm2", "mlp.up")
    )
    assert change.skipped == {
        f"vision.layers.{index}.mlp.down": "an activation stands between it and "
        f"vision.layers.{index}.mlp.up, and is not linear"
        for index in range(2)
    }
    assert set(change.measures) == {"inputs", "samples", "spread_before", "spread_after"}
    assert change.measures["inputs"] == 6


def test_an_interrupted_run_comes_to_the_same_bits(tmp_path: Path) -> None:
    spec = tiny_spec()
    cases = samples_of(spec, 2)
    whole, again = drawn(spec), drawn(spec)
    change = run_pass(Smooth(), whole, context(cases, work=tmp_path))
    (tmp_path / "decoder.layers.0.safetensors").unlink()
    assert run_pass(Smooth(), again, context(cases, work=tmp_path)) == change
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, again.get_parameter(name)), name


def test_plan() -> None:
    spec = tiny_spec()
    foresight = Smooth(components=("decoder",)).foresee(spec, context())
    assert foresight.spec is spec
    assert foresight.effect == "8 inputs scaled, 0 left; outputs do not change"


def test_needs_samples() -> None:
    with pytest.raises(PassError) as caught:
        run_pass(Smooth(components=("decoder",)), drawn(tiny_spec()), context())
    assert str(caught.value) == (
        "smooth at decoder.layers.0.attention.qkv: it is calibrated, and there are no calibration "
        "samples\n  hint: name a folder in calibration.data, or leave it out for the picture world"
    )


def test_comes_before_quantize() -> None:
    spec = Quantize.model_validate({"kv": "int8"}).foresee(tiny_spec(), context()).spec
    with pytest.raises(PassError) as caught:
        Smooth().foresee(spec, context())
    assert str(caught.value) == (
        "smooth: the maps that it scales are quantized already\n  hint: put smooth before quantize"
    )


def test_a_share_is_within_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    text = "model: model\ndevice: host-cpu\npasses:\n  - smooth: {alpha: 1.5}\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, tmp_path / "recipe.yaml")
    assert str(caught.value) == (
        f"{tmp_path / 'recipe.yaml'}:4:21: passes.0.smooth.alpha must be at most 1.0, got 1.5"
    )
