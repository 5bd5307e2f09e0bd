"""awq: scales against a search in numpy, folded where something takes them; outputs stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgevlm.errors import PassError, RecipeError
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes import Awq, Quantize, run_pass
from edgevlm.passes.stages import step_key
from edgevlm.quant.absorb import absorbers
from edgevlm.quant.rtn import rtn
from edgevlm.recipe import parse_recipe
from tests.edgevlm.calibrated import context, samples_of
from tests.edgevlm.passes.odd import SPECS, inputs_of, logits_of, nearest
from tests.edgevlm.quant import slow
from tests.edgevlm.quant.slow import Floats, float64
from tests.edgevlm.tiny import drawn, native_spec, tiny_spec

ALL = ("vision", "projector", "decoder", "head")


def uneven(spec: VlmSpec) -> Vlm:
    """A model whose inputs have channels of very different size, so that scales pay."""
    model = drawn(spec)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight") and "_norm" not in name:
                weight.mul_(torch.randn(weight.shape, generator=generator).exp())
    return model


def weight_of(model: Vlm, site: str) -> Floats:
    return float64(model.get_submodule(site).get_parameter("weight"))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_outputs_stay(spec: VlmSpec) -> None:
    model, cases = uneven(spec), samples_of(spec)
    before = logits_of(model, cases)
    assert before.std() > 0.5, "logits must be large enough to show a difference"
    seen = context(cases, probe=lambda changed: logits_of(changed, cases))
    change = run_pass(Awq(scheme="w4a16", group_size=16), model, seen)
    # float32 roundings in another order; 1e-4 is the bound of every lossless pass.
    torch.testing.assert_close(
        logits_of(model, cases), before, rtol=0, atol=1e-4 * float(before.std())
    )
    fresh = uneven(spec)
    changed = [
        site
        for site in change.sites
        if not torch.equal(
            model.get_submodule(site).get_parameter("weight"),
            fresh.get_submodule(site).get_parameter("weight"),
        )
    ]
    assert len(changed) > len(change.sites) / 2
    assert change.measures["error"] < 0.95


@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize(
    ("sites", "source", "copies"),
    [
        (("attention.qkv",), "norm1", (1, 1, 64)),
        # Query heads 0 and 1 read the values of head 0, 2 and 3 those of head 1.
        (("attention.out",), "attention.qkv", (2, 2, 16)),
        (("mlp.gate", "mlp.up"), "norm2", (1, 1, 64)),
        (("mlp.down",), "mlp.up", (1, 1, 80)),
    ],
)
def test_scales_are_the_best_of_all_candidates(
    sites: tuple[str, ...], source: str, copies: tuple[int, int, int], group_size: int
) -> None:
    spec = SPECS["untied"]
    before, after, cases = uneven(spec), uneven(spec), samples_of(spec, 2)
    layer = "decoder.layers.0"
    names = [f"{layer}.{site}" for site in sites]
    x = inputs_of(before, cases, names[:1])[names[0]]
    step = Awq(
        scheme="w4a16",
        group_size=group_size or None,
        per_channel=not group_size,
        components=("decoder",),
    )
    run_pass(step, after, context(cases))

    def shared(size: Floats) -> Floats:
        """The mean over the columns that come from one channel, by loops."""
        outer, times, inner = copies
        out = size.copy()
        for o in range(outer):
            for i in range(inner):
                columns = [(o * times + t) * inner + i for t in range(times)]
                out[columns] = size[columns].mean()
        return out

    stacked = np.concatenate([weight_of(before, name) for name in names])
    relative = np.zeros_like(stacked)
    for span in slow.groups_of(stacked.shape[1], group_size):
        part = np.abs(stacked[:, span])
        relative[:, span] = part / part.max(axis=1, keepdims=True)
    inputs, weights = shared(np.abs(x).mean(axis=0)), shared(relative.mean(axis=0))
    tried = [np.ones_like(inputs)]
    for exponent in np.arange(1, 21) / 20:
        tried += [inputs**exponent, inputs**exponent / weights ** (1 - exponent)]
    tried = [scale / np.sqrt(scale.max() * scale.min()) for scale in tried]
    errors = []
    for scale in tried:
        rounded = nearest(stacked * scale, group_size) / scale
        errors.append(slow.output_error(stacked, rounded, x))
    best = tried[int(np.argmin(errors))]
    # All that is left of a scale is what the maps are given, since the outputs stay.
    given = inputs_of(after, cases, names)
    for name in names:
        np.testing.assert_allclose(given[name], x / best, rtol=1e-3, atol=1e-4)
    assert not np.allclose(best, 1.0), "a scale of one would show nothing"


@pytest.mark.parametrize(
    ("spec", "ranges"),
    [*((spec, "minmax") for spec in SPECS.values()), (SPECS["untied"], "mse")],
    ids=[*SPECS, "mse"],
)
def test_is_never_worse_than_rounding_to_nearest(spec: VlmSpec, ranges: str) -> None:
    """On its own objective, the error of all outputs that read one input, with these ranges."""
    before, after, cases = uneven(spec), uneven(spec), samples_of(spec)
    found, _ = absorbers(spec, ALL)
    step = Awq.model_validate({"scheme": "w4a16", "group_size": 16, "ranges": ranges})
    run_pass(step, after, context(cases))
    for absorber in found:
        given = [inputs_of(model, cases, absorber.sites[:1]) for model in (before, after)]
        errors = np.zeros(2)
        for site in absorber.sites:
            # Rows of `up` and of values are divided too: they round alike, and are multiplied back.
            rows = weight_of(after, site) @ given[1][absorber.sites[0]][0]
            factor = weight_of(before, site) @ given[0][absorber.sites[0]][0] / rows
            for index, model in enumerate((before, after)):
                weight = model.get_submodule(site).get_parameter("weight").detach()
                tensor = rtn(weight, bits=4, group_size=16, symmetric=True, ranges=step.ranges)
                d = float64(weight) - float64(tensor.dequantize())
                d *= factor[:, None] if index else 1.0
                errors[index] += slow.output_error(d, 0.0 * d, given[index][absorber.sites[0]])
        # Inputs and factors in float32.
        assert errors[1] <= errors[0] * (1 + 1e-3), absorber.sites


def test_matches() -> None:
    """A gated decoder whose heads share values; behind the encoder's gelu nothing takes a scale."""
    model = uneven(tiny_spec())
    change = run_pass(Awq(scheme="w4a16"), model, context(samples_of(model.spec, 1)))
    layers = [
        site
        for index in range(2)
        for site in (
            f"decoder.layers.{index}.norm1",
            f"decoder.layers.{index}.attention.qkv",
            f"decoder.layers.{index}.attention.out",
            f"decoder.layers.{index}.norm2",
            f"decoder.layers.{index}.mlp.gate",
            f"decoder.layers.{index}.mlp.up",
            f"decoder.layers.{index}.mlp.down",
        )
    ]
    encoder = [
        site
        for index in range(2)
        for site in (
            f"vision.layers.{index}.norm1",
            f"vision.layers.{index}.attention.qkv",
            f"vision.layers.{index}.attention.out",
            f"vision.layers.{index}.norm2",
            f"vision.layers.{index}.mlp.up",
        )
    ]
    assert change.sites == (*encoder, *layers)
    assert change.skipped == {
        "vision.layers.0.mlp.down": "an activation stands between it and vision.layers.0.mlp.up, "
        "and is not linear",
        "vision.layers.1.mlp.down": "an activation stands between it and vision.layers.1.mlp.up, "
        "and is not linear",
        "projector.up": "its input leaves the vision encoder, and is compared with the reference "
        "there",
        "projector.down": "an activation stands between it and projector.up, and is not linear",
        "decoder.head": "it is the embedding, whose rows nothing divides",
    }
    assert change.measures["inputs"] == 14
    assert change.measures["samples"] == 1


def test_projectors_with_a_norm_and_heads_of_their_own_are_scaled() -> None:
    found, skipped = absorbers(native_spec((4, 6)), ("projector", "head"))
    assert [(absorber.source, absorber.sites) for absorber in found] == [
        ("projector.norm", ("projector.up",))
    ]
    assert list(skipped) == ["projector.down", "decoder.head"]
    found, skipped = absorbers(tiny_spec(tied=False), ("head",))
    assert [(absorber.source, absorber.sites) for absorber in found] == [
        ("decoder.norm", ("decoder.head",))
    ]
    assert skipped == {}


def test_pixels_and_one_linear_map_of_squares_are_left() -> None:
    spec = native_spec((4, 6))
    squares = replace(spec.projector, kind="pixel_shuffle", hidden_width=0, norm=None)
    _, skipped = absorbers(replace(spec, projector=squares), ("vision", "projector"))
    assert skipped["vision.embed.patch"] == "its input is pixels"
    assert skipped["projector.linear"] == (
        "its input leaves the vision encoder, and is compared with the reference there"
    )


def test_an_interrupted_run_comes_to_the_same_bits(tmp_path: Path) -> None:
    spec = tiny_spec()
    cases = samples_of(spec, 2)
    step = Awq(scheme="w4a16", group_size=16, components=("vision", "decoder"))
    whole = uneven(spec)
    change = run_pass(step, whole, context(cases, work=tmp_path))
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {
        f"{part}.layers.{index}.safetensors" for part in ("vision", "decoder") for index in (0, 1)
    }
    (tmp_path / "decoder.layers.1.safetensors").unlink()
    again = uneven(spec)
    assert run_pass(step, again, context(cases, work=tmp_path)) == change
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, again.get_parameter(name)), name


def test_the_samples_are_in_its_key() -> None:
    step = Awq(scheme="w4a16")
    keys = {step_key("a", step, context(samples_key=key)) for key in ("one", "two")}
    assert len(keys) == 2


def test_plan() -> None:
    spec = tiny_spec()
    foresight = Awq(scheme="w4a16").foresee(spec, context())
    assert foresight.spec is spec
    assert foresight.effect == "14 inputs scaled, 5 left; outputs do not change"


def test_needs_samples() -> None:
    with pytest.raises(PassError) as caught:
        run_pass(Awq(scheme="w4a16"), uneven(tiny_spec()), context())
    assert str(caught.value) == (
        "awq at vision.layers.0.attention.qkv: it is calibrated, and there are no calibration "
        "samples\n  hint: name a folder in calibration.data, or leave it out for the picture world"
    )


def test_a_part_without_any_input_to_scale_is_an_error() -> None:
    with pytest.raises(PassError) as caught:
        Awq(scheme="w4a16", components=("projector", "head")).foresee(tiny_spec(), context())
    assert str(caught.value) == (
        "awq: no input can be scaled (an activation stands between it and projector.up, and is not "
        "linear; it is the embedding, whose rows nothing divides; its input leaves the vision "
        "encoder, and is compared with the reference there)\n"
        "  hint: name other components, or remove the pass"
    )


def test_comes_before_quantize() -> None:
    quantize_all = Quantize.model_validate({"decoder": "w4a16"})
    spec = quantize_all.foresee(tiny_spec(), context()).spec
    with pytest.raises(PassError) as caught:
        Awq(scheme="w4a16").foresee(spec, context())
    assert str(caught.value) == (
        "awq: the maps that it scales are quantized already\n  hint: put awq before quantize"
    )


def test_nan_in_the_inputs_is_an_error() -> None:
    model = uneven(tiny_spec())
    with torch.no_grad():
        model.embedding.weight[:, 3] = torch.nan
    cases = samples_of(model.spec, 1)
    rows = sum(len(c.question.prompt.token_ids) + len(c.answer) - 1 for c in cases)
    with pytest.raises(PassError) as caught:
        run_pass(Awq(scheme="w4a16", components=("decoder",)), model, context(cases))
    assert str(caught.value) == (
        f"awq at decoder.layers.0.attention.qkv: {(rows - 16) * 64} of {rows * 64:,} activations "
        "are NaN or infinite\n"
        "  hint: check the weights of the checkpoint and the calibration data"
    )


def test_a_group_and_a_channel_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    text = (
        "model: model\ndevice: host-cpu\npasses:\n"
        "  - awq: {scheme: w4a16, group_size: 32, per_channel: true}\n"
    )
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, tmp_path / "recipe.yaml")
    assert str(caught.value) == (
        f"{tmp_path / 'recipe.yaml'}:4:42: group_size 32 and per_channel exclude each other\n"
        "  hint: remove one of them"
    )
