"""reduce: what it touches, what it refuses, and that a model after it is the one planned."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from edgevlm.device import load_device
from edgevlm.errors import PassError
from edgevlm.model.spec import VlmSpec
from edgevlm.passes import Context, Reduce, run_pass
from edgevlm.reduce.cost import prompt_rows, vision_macs
from edgevlm.tokens import token_plan
from tests.edgevlm.tiny import drawn, tiny_spec

CUT = {"at": "decoder", "layer": 1, "keep": 5, "score": "text_attention", "select": "top"}
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], float]] = {
    "visionzip": ({"method": "visionzip", "keep": 0.25}, ("vision",), 4.0),
    "uniform": ({"method": "uniform", "keep": 6}, ("projector",), 6.0),
    "fastv": ({"method": "fastv", "keep": 0.75}, ("decoder.layers.1",), 12.0),
    "two sites": (
        {"stages": ({"at": "projector", "keep": 12, "select": "spread"}, CUT)},
        ("projector", "decoder.layers.1"),
        8.5,
    ),
}


def context() -> Context:
    return Context(device=load_device("host-cpu"), targets=("ort", "static"))


@pytest.mark.parametrize("name", CASES)
def test_sites_and_tokens(name: str) -> None:
    options, sites, average = CASES[name]
    step, model = Reduce.model_validate(options), drawn(tiny_spec())
    expected = step.foresee(tiny_spec(), context()).spec
    change = run_pass(step, model, context())
    assert change.sites == sites
    assert change.measures == {"visual_tokens_before": 16, "visual_tokens": average}
    assert model.spec == expected


@pytest.mark.parametrize("name", CASES)
def test_a_picture_has_the_tokens_of_the_plan(name: str) -> None:
    model = drawn(tiny_spec())
    run_pass(Reduce.model_validate(CASES[name][0]), model, context())
    with torch.no_grad():
        rows = model.encode(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    tokens = token_plan(model.spec, capacity=64, max_new_tokens=8, text_rows=3)
    assert rows.shape == (1, tokens.layers[0], 64)
    assert torch.isfinite(rows).all()
    assert prompt_rows(model.spec, tokens.priced) == tuple(count + 3 for count in tokens.layers)


@pytest.mark.parametrize("name", ["visionzip", "uniform", "random", "divprune"])
def test_a_budget_of_all_tokens_changes_nothing(name: str) -> None:
    """I1: not one bit."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    whole, reduced = drawn(tiny_spec()), drawn(tiny_spec())
    run_pass(Reduce.model_validate({"method": name, "keep": 1.0}), reduced, context())
    with torch.no_grad():
        assert torch.equal(reduced.encode(pixels), whole.encode(pixels))
    assert vision_macs(reduced.spec, (4, 4)) == vision_macs(whole.spec, (4, 4))


def quantized(spec: VlmSpec) -> VlmSpec:
    from edgevlm.passes import Quantize

    return Quantize.model_validate({"vision": "w8a8"}).foresee(spec, context()).spec


def test_a_quantized_model_is_refused() -> None:
    with pytest.raises(PassError) as caught:
        Reduce.model_validate({"method": "uniform", "keep": 4}).foresee(
            quantized(tiny_spec()), context()
        )
    assert str(caught.value) == (
        "reduce: the model is quantized already, on activations that would no longer come\n"
        "  hint: put reduce before quantize"
    )


def test_reduction_comes_once() -> None:
    step = Reduce.model_validate({"method": "uniform", "keep": 4})
    after = step.foresee(tiny_spec(), context()).spec
    with pytest.raises(PassError) as caught:
        step.foresee(after, context())
    assert str(caught.value) == (
        "reduce: visual tokens are taken away already\n"
        "  hint: write the stages of both into one reduce"
    )


def test_the_manifest_is_told_of_the_tokens() -> None:
    """What the runtime expands a picture to, and how far kept positions reach."""
    step = Reduce.model_validate({"method": "uniform", "keep": 4})
    packed = step.foresee(tiny_spec(), context())
    assert packed.spec.image == {**tiny_spec().image, "tokens": [4]}
    stage = {"at": "projector", "keep": 4, "select": "uniform", "place": "keep"}
    kept = Reduce.model_validate({"stages": (stage,)}).foresee(tiny_spec(), context())
    assert kept.spec.image == {**tiny_spec().image, "tokens": [4], "spans": [16.0]}
    assert dataclasses.replace(kept.spec, image={}, reduction=None) == dataclasses.replace(
        tiny_spec(), image={}
    )
