"""The engine: what a map is calibrated on, what its numbers come to, and runs that break off."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgevlm.errors import PassError
from edgevlm.evidence.fed import pixels_of, positions
from edgevlm.model.quantized import QuantLinear
from edgevlm.model.vlm import Vlm
from edgevlm.quant import engine
from edgevlm.quant.calibrate import CalibrationCase
from edgevlm.quant.rtn import rtn
from edgevlm.quant.statistics import ANSWER_TIMES
from tests.edgevlm.calibrated import quantized, samples_of
from tests.edgevlm.quant.units import UNITS, unit_of
from tests.edgevlm.tiny import drawn, tiny_spec

ALL_STATIC = {
    "vision": "w8a8",
    "projector": "w8a8",
    "decoder": "w8a8",
    "prefill": "w8a16",
    "head": "w8a16",
    "embedding": "int8",
}
INTEGERS = {"int8": 256, "int16": 65536}


def up_to(float_model: Vlm, made: Vlm, unit: str) -> Vlm:
    """The float model with the quantized table, and the quantized units before this one."""
    model = copy.deepcopy(float_model)
    if made.prefill is not None:
        model.split_phases()
    model.embedding = made.embedding
    for site in made.spec.schemes:
        if UNITS.index(unit_of(site)) < UNITS.index(unit):
            model.set_submodule(site, made.get_submodule(site))
    return model


@torch.no_grad()
def inputs_of(
    model: Vlm, site: str, cases: Sequence[CalibrationCase], *, answers: bool = True
) -> Tensor:
    """All rows [M, K] that a site reads, by plain forward passes over the samples."""
    seen: list[Tensor] = []
    module = model.get_submodule(site)
    handle = module.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].flatten(0, -2))
    )
    decoder = model.prefill if site.startswith("prefill.") else model.decoder
    assert decoder is not None
    answers = answers and not site.startswith("prefill.")
    try:
        for case in cases:
            question = case.question
            visual = torch.cat(
                [model.encode(pixels_of(feed)).flatten(0, 1) for feed in question.feeds]
            )
            rows = model.embed(torch.from_numpy(question.prompt.token_ids), visual)
            fed = torch.tensor(case.answer[:-1] if answers else (), dtype=torch.long)
            rows = torch.cat([rows, model.embedding(fed)[None]], dim=1)
            model.whole(decoder, rows, positions(question, len(fed)))
    finally:
        handle.remove()
    return torch.cat(seen)


@pytest.fixture(scope="module")
def cases() -> list[CalibrationCase]:
    return samples_of(tiny_spec())


@pytest.fixture(scope="module")
def made(cases: list[CalibrationCase]) -> Vlm:
    """A model all of whose maps have constants from calibration."""
    model = drawn(tiny_spec())
    quantized(model, ALL_STATIC, cases, targets=("static",))
    return model


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_calibrated_on_what_the_quantized_units_before_it_give(
    made: Vlm, cases: list[CalibrationCase], unit: str
) -> None:
    """The units after it are float, and so are the other maps of the unit itself."""
    before = up_to(drawn(tiny_spec()), made, unit)
    sites = [site for site in made.spec.schemes if unit_of(site) == unit]
    assert sites
    for site in sites:
        module = made.get_submodule(site)
        scheme = made.spec.schemes[site]
        assert isinstance(module, QuantLinear)
        assert scheme.activations is not None
        x = inputs_of(before, site, cases).double().numpy()
        steps = INTEGERS[scheme.activations.dtype] - 1
        low, high = min(x.min(), 0.0), max(x.max(), 0.0)
        scale = (high - low) / steps
        zero = np.clip(-(steps + 1) / 2 - np.round(low / scale), -(steps + 1) / 2, steps / 2)
        assert module.x_scale is not None
        assert module.x_zero is not None
        # Ends are float32, and the scale is rounded to it once.
        np.testing.assert_allclose(module.x_scale.numpy(), scale, rtol=3e-7, err_msg=site)
        assert int(module.x_zero) == int(zero), site


def test_a_float_model_would_have_given_other_ranges(
    made: Vlm, cases: list[CalibrationCase]
) -> None:
    """Else the test above could not tell the two apart."""
    site = "decoder.layers.1.mlp.down"
    plain = inputs_of(drawn(tiny_spec()), site, cases)
    behind = inputs_of(up_to(drawn(tiny_spec()), made, unit_of(site)), site, cases)
    difference = abs(float(plain.max() - plain.min()) / float(behind.max() - behind.min()) - 1)
    assert difference > 1e-4


def test_what_the_decoder_for_prompts_sees_are_prompts(
    made: Vlm, cases: list[CalibrationCase]
) -> None:
    model = drawn(tiny_spec())
    quantized(model, {"prefill": {"scheme": "w4a16", "method": "gptq"}}, cases)
    rows = sum(len(case.question.prompt.token_ids) for case in cases)
    site = "prefill.layers.0.attention.qkv"
    assert len(inputs_of(up_to(drawn(tiny_spec()), made, "prefill.layers.0"), site, cases)) == rows
    assert model.decoder.layers[0].attention.qkv.weight.dtype == torch.float32


def times_of(cases: Sequence[CalibrationCase]) -> Tensor:
    """How often every row of the decoder counts."""
    times: list[int] = []
    for case in cases:
        # The row behind the last token of the prompt predicts the first of the answer.
        times += [1] * (len(case.question.prompt.token_ids) - 1)
        times += [ANSWER_TIMES] * len(case.answer)
    return torch.tensor(times, dtype=torch.float64)


@pytest.mark.parametrize(
    ("part", "rows"),
    [("decoder", times_of(samples_of(tiny_spec())).sum()), ("prefill", None), ("vision", None)],
)
def test_rows_that_predict_an_answer_count_many_times(
    cases: list[CalibrationCase], part: str, rows: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, int] = {}
    plain = engine.quantized_linear

    def noted(*arguments: Any, site: str) -> QuantLinear:
        statistics = arguments[3]
        counts[site] = statistics.products.count
        return plain(*arguments, site=site)

    monkeypatch.setattr(engine, "quantized_linear", noted)
    site = f"{part}.layers.1.mlp.up"
    quantized(drawn(tiny_spec()), {part: {"scheme": "w4a16", "method": "gptq"}}, cases)
    seen = inputs_of(drawn(tiny_spec()), site, cases) if part != "prefill" else None
    prompts = sum(len(case.question.prompt.token_ids) for case in cases)
    assert counts[site] == (rows or (prompts if seen is None else len(seen)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_no_worse_than_rounding_to_nearest_on_what_each_site_sees(
    cases: list[CalibrationCase], symmetric: bool
) -> None:
    """The objective is the squared error of outputs over the very inputs of calibration.

    Rows of the decoder that predict an answer count as often as ANSWER_TIMES says.
    """
    options = {"scheme": "w4a16", "group_size": 16, "method": "gptq", "symmetric": symmetric}
    model, plain = drawn(tiny_spec()), drawn(tiny_spec())
    quantized(model, {"vision": options, "decoder": options}, cases)
    ratios = []
    for site in model.spec.schemes:
        module = model.get_submodule(site)
        assert isinstance(module, QuantLinear)
        x = inputs_of(up_to(plain, model, unit_of(site)), site, cases).double()
        if site.startswith("decoder."):
            x = x * times_of(cases).sqrt()[:, None]
        weight = plain.get_submodule(site).get_parameter("weight").detach()
        nearest = rtn(weight, bits=4, group_size=16, symmetric=symmetric, ranges="mse").dequantize()
        ours, theirs = (
            float((x @ (weight - other).double().T).square().sum())
            for other in (module.float_weight(), nearest)
        )
        # Second moments are summed in float32.
        assert ours <= theirs * (1 + 1e-4), site
        ratios.append(ours / theirs)
    assert np.mean(ratios) < 0.8


@torch.no_grad()
def test_bias_correction_removes_the_mean_error(cases: list[CalibrationCase]) -> None:
    """Of maps that have a bias, over the rows of calibration, where only weights are rounded."""
    errors: dict[bool, float] = {}
    for corrected in (False, True):
        plain, model = drawn(tiny_spec()), drawn(tiny_spec())
        options = {"vision": "w4a16", "projector": "w4a16", "bias_correction": corrected}
        quantized(model, options, cases)
        worst = 0.0
        for site in model.spec.schemes:
            x = inputs_of(up_to(plain, model, unit_of(site)), site, cases)
            want, got = plain.get_submodule(site)(x), model.get_submodule(site)(x)
            worst = max(worst, float((got - want).double().mean(dim=0).abs().max()))
        errors[corrected] = worst
    # Outputs of size 1, of up to 150 rows in float32.
    assert errors[True] < 2e-6
    assert errors[False] > 1e-2


def test_weights_are_those_of_the_numerics() -> None:
    model, plain = drawn(tiny_spec()), drawn(tiny_spec())
    quantized(model, {"decoder": {"scheme": "w4a16", "ranges": "mse", "symmetric": False}})
    for site in model.spec.schemes:
        weight = plain.get_submodule(site).get_parameter("weight").detach()
        want = rtn(weight, bits=4, group_size=32, symmetric=False, ranges="mse")
        module = model.get_submodule(site)
        assert torch.equal(module.get_parameter("weight"), want.values)
        assert torch.equal(module.get_parameter("scale"), want.scale)
        assert want.zero is not None
        assert torch.equal(module.get_parameter("zero"), want.zero)


HINT = "\n  hint: check the checkpoint, and the passes before this one"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(value: float) -> None:
    model = drawn(tiny_spec())
    with torch.no_grad():
        model.decoder.layers[1].mlp.up.weight[3, 2] = value
    with pytest.raises(PassError) as caught:
        quantized(model, {"decoder": "w8a16"})
    assert str(caught.value) == (
        f"quantize at decoder.layers.1.mlp.up: its weights hold NaN or infinity{HINT}"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"vision": {"scheme": "w8a8", "activations": "static"}},
        {"vision": {"scheme": "w4a16", "method": "gptq"}},
        {"vision": "w4a16", "bias_correction": True},
    ],
    ids=["ranges", "products", "means"],
)
def test_activations_that_are_no_numbers(options: dict[str, Any]) -> None:
    """One feature of attention's output is NaN: it is the second map that reads it."""
    model = drawn(tiny_spec())
    with torch.no_grad():
        model.vision.layers[0].norm1.bias[5] = math.nan
    with pytest.raises(PassError) as caught:
        quantized(model, options, samples_of(model.spec, 1))
    # 17 rows of 32 features.
    assert str(caught.value) == (
        "quantize at vision.layers.0.attention.qkv: 17 of 544 activations are NaN or infinite\n"
        "  hint: check the weights of the checkpoint and the calibration data"
    )


@pytest.mark.parametrize(
    ("options", "site"),
    [
        ({"decoder": {"scheme": "w4a16", "method": "gptq"}}, "decoder.layers.0.attention.qkv"),
        ({"vision": "w4a16", "bias_correction": True}, "vision.layers.0.attention.qkv"),
        ({"kv": "int8"}, "decoder.layers.0.attention.core"),
    ],
    ids=["products", "means", "caches"],
)
def test_no_samples(options: dict[str, Any], site: str) -> None:
    with pytest.raises(PassError) as caught:
        quantized(drawn(tiny_spec()), options, [])
    assert str(caught.value) == (
        f"quantize at {site}: it is calibrated, and there are no calibration samples\n"
        "  hint: name a folder in calibration.data, or leave it out for the picture world"
    )


def test_what_needs_no_samples_draws_none() -> None:
    model = drawn(tiny_spec())
    change = quantized(model, {"vision": "w8a8", "decoder": "w4a16", "embedding": "int4"}, [])
    assert change.measures["samples"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"vision": {"scheme": "w8a8", "activations": "static"}},
        {"vision": {"scheme": "w4a16", "method": "gptq"}},
        {"vision": "w4a16", "bias_correction": True},
    ],
    ids=["ranges", "products", "means"],
)
def test_samples_without_pictures_never_reach_the_encoder(options: dict[str, Any]) -> None:
    cases = [without_pictures(case) for case in samples_of(tiny_spec(), 2)]
    with pytest.raises(PassError) as caught:
        quantized(drawn(tiny_spec()), options, cases)
    assert str(caught.value) == (
        "quantize at vision.layers.0.attention.qkv: calibration never reached it\n"
        "  hint: give samples that use this part of the model, or leave it out with `skip`"
    )


def test_samples_without_pictures_are_enough_for_the_decoder() -> None:
    cases = [without_pictures(case) for case in samples_of(tiny_spec(), 2)]
    model = drawn(tiny_spec())
    options = {"scheme": "w8a8", "activations": "static"}
    change = quantized(model, {"decoder": options, "kv": "int8"}, cases)
    assert change.measures["samples"] == 2


def without_pictures(case: CalibrationCase) -> CalibrationCase:
    from dataclasses import replace

    prompt = case.question.prompt
    kept = np.setdiff1d(np.arange(len(prompt.token_ids)), prompt.image_rows)
    words = replace(
        prompt,
        token_ids=prompt.token_ids[kept],
        image_rows=np.zeros(0, np.int64),
        positions=np.arange(len(kept)),
        next_position=len(kept),
    )
    return replace(case, question=replace(case.question, images=(), prompt=words))


def test_maps_of_one_reader_share_what_is_known_of_it(
    cases: list[CalibrationCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up read the same rows, for prompts as for tokens."""
    made: list[str] = []
    original = engine.Statistics

    def noted(site: str, *arguments: Any, **more: Any) -> Any:
        made.append(site)
        return original(site, *arguments, **more)

    monkeypatch.setattr(engine, "Statistics", noted)
    static = {"scheme": "w8a8", "activations": "static"}
    quantized(drawn(tiny_spec()), {"decoder": static, "prefill": static}, cases)
    parts = ("attention.qkv", "attention.out", "mlp.gate", "mlp.down")
    assert made == [
        f"{phase}.layers.{index}.{part}"
        for phase in ("prefill", "decoder")
        for index in range(2)
        for part in parts
    ]


def test_the_model_is_in_float_where_nothing_is_asked(cases: list[CalibrationCase]) -> None:
    model, plain = drawn(tiny_spec()), drawn(tiny_spec())
    quantized(model, {"vision": "w8a8"}, cases)
    assert isinstance(model.decoder.layers[0].get_submodule("mlp.up"), nn.Linear)
    for name, weight in plain.named_parameters():
        if not name.startswith("vision.layers") or "norm" in name or "bias" in name:
            assert torch.equal(model.get_parameter(name), weight), name
