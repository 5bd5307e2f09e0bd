"""The pass reduce: what it foresees, what it does to a model, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from edgevlm.errors import PassError
from edgevlm.model.spec import VlmSpec
from edgevlm.model.stages import Pictures
from edgevlm.model.vlm import Vlm
from edgevlm.passes import Quantize, Reduce, run_pass
from tests.edgevlm.calibrated import context
from tests.edgevlm.tiny import drawn, tiny_spec

SPEC = tiny_spec()
TOKENS = 16


def reduction(**options: Any) -> Reduce:
    return Reduce.model_validate(options)


def after(spec: VlmSpec, **options: Any) -> VlmSpec:
    return reduction(**options).foresee(spec, context()).spec


def logits(model: Vlm) -> Tensor:
    """Logits of a prompt with a picture, its last row."""
    vision = model.spec.vision
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, *vision.pixels_shape(vision.grids[0]), generator=generator)
    with torch.no_grad():
        rows = model.encode(pixels)[0]
        ids = torch.tensor([5, 6, *[model.spec.image_token_id] * len(rows), 7, 8, 9])
        last = torch.tensor([len(ids) - 1])
        pictures = Pictures(starts=torch.tensor([2]), last=last)
        found = model(model.embed(ids, rows), torch.arange(len(ids)), last, pictures)
    return found[0, 0]


def test_a_plan_knows_the_tokens_that_are_left() -> None:
    spec = after(SPEC, method="divprune", keep=0.25)
    grid = spec.vision.grids[0]
    assert (SPEC.image_tokens(grid), spec.image_tokens(grid)) == (TOKENS, 4)
    assert spec.dense_tokens(grid) == TOKENS
    assert spec.image["tokens"] == [4]
    assert [segment.tokens for segment in spec.segments] == [4]


def test_a_cut_in_the_decoder_keeps_the_prompt_whole() -> None:
    stage = {"at": "decoder", "layer": 1, "keep": 4, "score": "text_attention", "select": "top"}
    spec = after(SPEC, stages=(stage,))
    assert spec.image["tokens"] == [TOKENS]
    assert [(part.group, part.first, part.end, part.tokens) for part in spec.segments] == [
        ("main", 0, 1, TOKENS),
        ("from_1", 1, 2, 4),
    ]


def test_a_budget_is_an_average_over_layers() -> None:
    """Two layers, a cut between: (16 + k) / 2 is three quarters of 16 where k is 8."""
    stage = {"at": "decoder", "layer": 1, "score": "text_attention", "select": "top"}
    spec = after(SPEC, stages=(stage,), keep=0.75)
    assert spec.segments[1].tokens == 8


@pytest.mark.parametrize(
    "options",
    [
        {"method": "divprune", "keep": 0.5},
        {"method": "fourier", "keep": 0.25},
        {"method": "visionzip", "keep": 0.5},
        {"stages": ({"at": "decoder", "layer": 1, "keep": 4, "score": "random", "select": "top"},)},
    ],
    ids=lambda options: options.get("method", "a cut"),
)
def test_a_model_has_what_was_foreseen(options: dict[str, Any]) -> None:
    model = drawn(SPEC)
    before = logits(model)
    change = run_pass(reduction(**options), model, context())
    assert model.spec == after(SPEC, **options)
    assert change.sites
    assert change.measures["visual_tokens"] < change.measures["visual_tokens_before"] == TOKENS
    found = logits(model)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, before)


def test_all_tokens_kept_is_the_same_model() -> None:
    """Bit by bit: the stages run, and choose every token."""
    model = drawn(SPEC)
    before = logits(model)
    run_pass(reduction(method="divprune", keep=1.0), model, context())
    assert torch.equal(logits(model), before)


def test_once_is_enough() -> None:
    spec = after(SPEC, method="divprune", keep=0.5)
    with pytest.raises(PassError) as error:
        reduction(method="uniform", keep=0.5).foresee(spec, context())
    assert str(error.value) == (
        "reduce: visual tokens are taken away already\n  hint: make one of the two"
    )


def test_quantization_comes_after() -> None:
    spec = Quantize.model_validate({"projector": "w8a16"}).foresee(SPEC, context()).spec
    with pytest.raises(PassError) as error:
        reduction(method="uniform", keep=0.5).foresee(spec, context())
    assert str(error.value) == (
        "reduce: the model is quantized already, on activations that would no longer come\n"
        "  hint: put reduce before quantize"
    )


def test_a_tower_without_a_class_token_needs_leave() -> None:
    spec = replace(SPEC, vision=replace(SPEC.vision, class_token=False, drop_first_row=False))
    stage = {"at": "encoder", "keep": 4, "score": "encoder_attention", "select": "top"}
    with pytest.raises(PassError) as error:
        reduction(stages=(stage,)).foresee(spec, context())
    assert str(error.value) == (
        "reduce: stage 1: it scores by the attention of the class token, and this encoder has none"
        "\n  hint: add instead: all, which takes what every patch gives"
    )
    allowed = {**stage, "score": {"encoder_attention": {"instead": "all"}}}
    decisions = reduction(stages=(allowed,)).foresee(spec, context()).decisions
    assert [decision.outcome for decision in decisions] == ["applied", "degraded"]
    assert decisions[1].effect == "tokens are scored by the attention they get from all patches"
