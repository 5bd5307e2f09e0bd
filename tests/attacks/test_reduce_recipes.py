"""Bad visual-token reduction in recipes: refused in one line that says what would work."""

from __future__ import annotations

import pytest

from edgevlm.errors import PassError, RecipeError
from edgevlm.model.spec import VlmSpec
from edgevlm.plan import Plan, make_plan, recipe_device
from edgevlm.recipe import parse_recipe
from edgevlm.reduce.catalogue import method_names
from tests.edgevlm.tiny import tiny_spec

HEAD = "model: owner/name\ndevice: host-cpu\n"


def planned(passes: str, spec: VlmSpec) -> Plan:
    recipe = parse_recipe(f"{HEAD}passes:\n{passes}")
    return make_plan(recipe, recipe_device(recipe), spec)


def message(passes: str, spec: VlmSpec | None = None) -> str:
    with pytest.raises((RecipeError, PassError)) as caught:
        planned(passes, spec or tiny_spec())
    assert caught.value.exit_code == 2
    return str(caught.value)


def of_stages(stages: str, spec: VlmSpec | None = None) -> str:
    return message(f"  - reduce: {{stages: [{stages}]}}\n", spec)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            "{method: visionzip, keep: 17}",
            "reduce: cannot keep 17 of 16 visual tokens\n  hint: choose from 1 to 16, or a share",
        ),
        (
            "{method: visionzip, keep: 0}",
            "recipe.yaml:4:39: keep must be at least one token, got 0",
        ),
        (
            "{method: visionzip, keep: 0.0}",
            "recipe.yaml:4:39: a share of tokens must be above 0 and at most 1, got 0.0\n"
            "  hint: write a whole number of tokens without a point",
        ),
        (
            "{method: visionzip, keep: -3}",
            "recipe.yaml:4:39: keep must be at least one token, got -3",
        ),
        (
            "{method: visionzip, keep: 1.5}",
            "recipe.yaml:4:39: a share of tokens must be above 0 and at most 1, got 1.5\n"
            "  hint: write a whole number of tokens without a point",
        ),
        (
            "{method: visionzip, keep: .nan}",
            "recipe.yaml:4:39: a share of tokens must be above 0 and at most 1, got nan\n"
            "  hint: write a whole number of tokens without a point",
        ),
        (
            "{method: visionzip, keep: many}",
            "recipe.yaml:4:39: keep must be a share or a number of tokens, got 'many'",
        ),
        (
            "{method: visionzip, keep: true}",
            "recipe.yaml:4:39: keep must be a share or a number of tokens, got true",
        ),
        (
            "{method: visionzip}",
            "reduce: stages keep a budget, and none is given\n"
            "  hint: write keep: 0.25 beside the method",
        ),
        (
            "{method: fastv, keep: 0.25}",
            "reduce: an average of 4 of 16 tokens is out of reach: over 2 layers these stages "
            "leave at least 8.5, 53.1 %\n  hint: ask for 0.532 or more, or cut earlier",
        ),
        (
            "{method: visionzp, keep: 0.25}",
            "recipe.yaml:4:14: unknown method 'visionzp'\n  hint: did you mean 'visionzip'?",
        ),
        (
            "{method: fastv, keep: 4, stages: [{at: projector, keep: 4, select: spread}]}",
            "recipe.yaml:4:13: a reduction has either a method or stages\n"
            f"  hint: write method: {method_names()[0]}, or stages",
        ),
        (
            "{keep: 0.25}",
            "recipe.yaml:4:13: a reduction has either a method or stages\n"
            f"  hint: write method: {method_names()[0]}, or stages",
        ),
        (
            "{method: fastv, kep: 0.9}",
            "recipe.yaml:4:29: unknown key 'kep'\n  hint: did you mean 'keep'?",
        ),
        (
            "{keep: 4, stages: [{at: projector, keep: 4, select: spread}]}",
            "reduce: keep is 4, and every stage says itself what it keeps\n"
            "  hint: remove keep, or write keep: budget in a stage",
        ),
        (
            "{method: fastv, keep: 0.9, pictures: 0}",
            "recipe.yaml:4:50: passes.0.reduce.pictures must be at least 1, got 0",
        ),
    ],
)
def test_a_method_at_a_budget(options: str, expected: str) -> None:
    assert message(f"  - reduce: {options}\n") == expected


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            "{at: projector, keep: 17, select: spread}",
            "reduce: stage 1: cannot keep 17 of the 16 tokens that come\n  hint: keep at most 16",
        ),
        (
            "{at: projector, keep: 8, select: spread}, {at: projector, keep: 9, select: spread}",
            "reduce: stage 2: cannot keep 9 of the 8 tokens that come\n  hint: keep at most 8",
        ),
        (
            "{at: projector, keep: 0, select: spread}",
            "reduce: stage 1: it keeps none of the 16 tokens that come\n"
            "  hint: keep at least one; in the decoder a stage may keep none",
        ),
        (
            "{at: projector, keep: 0.01, select: spread}",
            "reduce: stage 1: it keeps none of the 16 tokens that come\n"
            "  hint: keep at least one; in the decoder a stage may keep none",
        ),
        (
            "{at: projector, keep: -1, select: spread}",
            "recipe.yaml:4:45: keep must be a number of tokens, a share such as 0.25, or 'budget', "
            "got -1",
        ),
        (
            "{at: projector, keep: 1.2, select: spread}",
            "recipe.yaml:4:45: a share of tokens must be between 0 and 1, got 1.2\n"
            "  hint: write a whole number of tokens without a point",
        ),
        (
            "{at: projector, keep: budget^0, select: spread}",
            "recipe.yaml:4:45: keep must be a number of tokens, a share such as 0.25, or 'budget', "
            "got 'budget^0'\n  hint: write 'budget'",
        ),
        (
            "{at: projector, select: spread}",
            "reduce: stages keep a budget, and none is given\n"
            "  hint: write keep: 0.25 beside the method",
        ),
    ],
)
def test_numbers_of_tokens(stages: str, expected: str) -> None:
    assert of_stages(stages) == expected


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            "{at: projector, keep: 8, select: spread}, "
            "{at: projector, keep: 4, transform: fourier}",
            "reduce: stage 2: 'fourier' takes a whole grid, and the tokens lie on none\n"
            "  hint: put it before stages that select or merge",
        ),
        (
            "{at: encoder, keep: 8, merge: bipartite}, "
            "{at: projector, keep: 4, transform: fourier}",
            "reduce: stage 2: 'fourier' takes a whole grid, and the tokens lie on none\n"
            "  hint: put it before stages that select or merge",
        ),
        (
            "{at: projector, keep: 8, select: spread}, {at: projector, keep: 4, select: cover}",
            "reduce: stage 2: it looks at the encoder's features of every token, and a stage "
            "before it at projector took some\n"
            "  hint: put it first, or the other stage at encoder",
        ),
        (
            "{at: encoder, keep: 8, select: cover}",
            "recipe.yaml:4:24: 'cover' cannot stand at encoder\n  hint: choose projector",
        ),
        (
            "{at: encoder, keep: 8, score: {text_attention: {query: words}}, select: top}",
            "recipe.yaml:4:24: 'text_attention' cannot stand at encoder\n  hint: choose decoder",
        ),
        (
            "{at: decoder, layer: 2, keep: 8, score: text_attention, select: top}",
            "reduce: stage 1 stands before layer 2 of a decoder of 2\n"
            "  hint: choose a layer from 1 to 1; before the first, use projector",
        ),
        (
            "{at: decoder, layer: 0, keep: 8, score: text_attention, select: top}",
            "reduce: stage 1 stands before layer 0 of a decoder of 2\n"
            "  hint: choose a layer from 1 to 1; before the first, use projector",
        ),
        (
            "{at: decoder, layer: -1, keep: 8, score: text_attention, select: top}",
            "recipe.yaml:4:44: passes.0.reduce.stages.0.layer must be at least 0, got -1",
        ),
        (
            "{at: decoder, depth: 0.5, layer: 1, keep: 8, score: text_attention, select: top}",
            "recipe.yaml:4:23: a stage of the decoder names one of layer and depth\n"
            "  hint: write layer: 8, or depth: 0.25",
        ),
        (
            "{at: decoder, depth: 1.0, keep: 8, score: text_attention, select: top}",
            "recipe.yaml:4:44: passes.0.reduce.stages.0.depth must be less than 1.0, got 1.0",
        ),
        (
            "{at: projector, layer: 1, keep: 8, select: spread}",
            "recipe.yaml:4:39: layer is for stages of the decoder, not for projector\n"
            "  hint: remove layer",
        ),
        (
            "{at: decoder, layer: 1, keep: 8, score: text_attention, select: top}, "
            "{at: projector, keep: 8, select: spread}",
            "reduce: stage 2 at projector stands before the one that is written above it\n"
            "  hint: write stages in the order in which tokens pass them",
        ),
        (
            "{at: decoder, layer: 1, keep: 8, score: text_attention, select: top}, "
            "{at: decoder, layer: 1, keep: 4, score: text_attention, select: top}",
            "reduce: stage 2 at decoder stands before the one that is written above it\n"
            "  hint: write stages in the order in which tokens pass them",
        ),
        (
            "{at: projector, keep: 3, score: random, select: {top: {lattice: 2}}}",
            "reduce: stage 1: a lattice of every 2 of 4 x 4 tokens holds 4, and 3 are kept\n"
            "  hint: keep more tokens, or widen the lattice",
        ),
        (
            "{at: encoder, keep: 8, score: {encoder_attention: {layer: -3}}, select: top}",
            "reduce: stage 1: it looks at layer -3 of an encoder of 2\n"
            "  hint: choose from -2 to -1",
        ),
    ],
)
def test_places_of_stages(stages: str, expected: str) -> None:
    assert of_stages(stages) == expected


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            "{at: projektor, keep: 8, select: spread}",
            "recipe.yaml:4:28: passes.0.reduce.stages.0.at must be one of 'input', "
            "'encoder.layers', 'encoder', 'projector', 'decoder', got 'projektor'\n"
            "  hint: did you mean 'projector'?",
        ),
        (
            "{at: projector, kep: 8, select: spread}",
            "recipe.yaml:4:39: unknown key 'kep'\n  hint: did you mean 'keep'?",
        ),
        (
            "{at: projector, keep: 8, select: sprad}",
            "recipe.yaml:4:56: unknown selector 'sprad'\n  hint: did you mean 'spread'?",
        ),
        (
            "{at: projector, keep: 8, select: {sprad: {}}}",
            "recipe.yaml:4:57: unknown selector 'sprad'\n  hint: did you mean 'spread'?",
        ),
        (
            "{at: projector, keep: 8, score: randm, select: top}",
            "recipe.yaml:4:55: unknown score 'randm'\n  hint: did you mean 'random'?",
        ),
        (
            "{at: encoder, keep: 8, transform: furier}",
            "recipe.yaml:4:57: unknown transform 'furier'\n  hint: did you mean 'fourier'?",
        ),
        (
            "{at: projector, keep: 8, score: random, select: {top: {latice: 3}}}",
            "recipe.yaml:4:78: unknown key 'latice'\n  hint: did you mean 'lattice'?",
        ),
        (
            "{at: projector, keep: 8, score: random, select: {top: {lattice: 1}}}",
            "recipe.yaml:4:87: passes.0.reduce.stages.0.select.top.lattice must be at least 2, "
            "got 1",
        ),
        (
            "{at: projector, keep: 8}",
            "recipe.yaml:4:23: a stage has one of select, merge, transform, bottleneck, got none\n"
            "  hint: add select: uniform, or another",
        ),
        (
            "{at: projector, keep: 8, select: spread, merge: bipartite}",
            "recipe.yaml:4:23: a stage has one of select, merge, transform, bottleneck, got select "
            "and merge\n"
            "  hint: write one stage for each",
        ),
        (
            "{at: projector, keep: 8, score: random, transform: fourier}",
            "recipe.yaml:4:48: score goes with select\n  hint: remove score",
        ),
    ],
)
def test_unknown_names(stages: str, expected: str) -> None:
    assert of_stages(stages) == expected


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (
            "  - quantize: {vision: w8a8}\n  - reduce: {method: visionzip, keep: 0.25}\n",
            "reduce: the model is quantized already, on activations that would no longer come\n"
            "  hint: put reduce before quantize",
        ),
        (
            "  - reduce: {method: visionzip, keep: 0.25}\n  - reduce: {method: fastv, keep: 0.9}\n",
            "reduce: visual tokens are taken away already\n"
            "  hint: write the stages of both into one reduce",
        ),
    ],
)
def test_order_of_passes(passes: str, expected: str) -> None:
    assert message(passes) == expected
