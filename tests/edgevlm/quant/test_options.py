"""What a recipe may say of quantization, and what each mistake is answered with."""

from __future__ import annotations

import pytest

from edgevlm.errors import RecipeError
from edgevlm.passes import Quantize
from edgevlm.quant.options import KvOptions, SchemeOptions, SiteOptions, TableOptions
from edgevlm.recipe import parse_recipe

HEAD = "model: owner/name\ndevice: host-cpu\npasses:\n  - quantize:\n"
NAMES = "'w4a16', 'w4a8', 'w8a16', 'w8a8', 'w16a16', 'fp8'"


def parsed(*lines: str) -> Quantize:
    """The pass of a recipe whose options are these lines, the first of them line 5."""
    text = HEAD + "".join(f"      {line}\n" for line in lines)
    (step,) = parse_recipe(text).passes
    assert isinstance(step, Quantize)
    return step


def test_a_name_stands_for_a_mapping() -> None:
    step = parsed("vision: w8a8", "kv: int8", "embedding: int4", "prefill: {scheme: w8a8}")
    assert step.vision == step.prefill == SchemeOptions(scheme="w8a8")
    assert step.kv == KvOptions(dtype="int8", granularity="channel")
    assert step.embedding == TableOptions(dtype="int4", group_size=32)
    assert step.decoder is step.head is step.projector is step.budget is None
    assert step.sites == ()


def test_all_that_a_scheme_can_say() -> None:
    step = parsed(
        "decoder: {scheme: w4a16, group_size: 64, symmetric: false, method: gptq, ranges: mse,",
        "          instead: w4a8}",
        "vision: {scheme: w8a8, per_channel: true, activations: tensor}",
        "sites:",
        "  - {match: decoder.layers.0.*, skip: it does the most harm}",
        "  - {match: vision.layers.1.mlp.up, scheme: w8a16}",
    )
    assert step.decoder == SchemeOptions(
        scheme="w4a16",
        group_size=64,
        symmetric=False,
        method="gptq",
        ranges="mse",
        instead="w4a8",
    )
    assert step.vision == SchemeOptions(scheme="w8a8", per_channel=True, activations="tensor")
    assert step.sites == (
        SiteOptions(match="decoder.layers.0.*", skip="it does the most harm"),
        SiteOptions(match="vision.layers.1.mlp.up", scheme=SchemeOptions(scheme="w8a16")),
    )


def test_choices_of_a_budget_are_names_or_mappings() -> None:
    step = parsed("vision: w4a16", "budget: {finer: [w8a16, {scheme: w8a8}, float], max_mib: 9}")
    assert step.budget is not None
    assert step.budget.finer == (
        SchemeOptions(scheme="w8a16"),
        SchemeOptions(scheme="w8a8"),
        "float",
    )
    usual = parsed("vision: w4a16", "budget: {max_accuracy_drop: 0.01}").budget
    assert usual is not None
    assert usual.finer == (SchemeOptions(scheme="w8a16"), "float")


RULE = "a site rule has either a scheme or skip\n  hint: write skip: REASON, or a scheme"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "vision: w4a9",
            f"5:15: passes.0.quantize.vision must be one of {NAMES}, got 'w4a9'\n"
            "  hint: did you mean 'w4a8'?",
        ),
        (
            "vision: {scheme: w4a61}",
            f"5:24: passes.0.quantize.vision.scheme must be one of {NAMES}, got 'w4a61'\n"
            "  hint: did you mean 'w4a16'?",
        ),
        (
            "vision: {scheme: int8}",
            f"5:24: passes.0.quantize.vision.scheme must be one of {NAMES}, got 'int8'",
        ),
        (
            "vison: w8a8",
            "5:7: unknown key 'vison'\n  hint: did you mean 'vision'?",
        ),
        (
            "vision: {scheme: w4a16, groupsize: 32}",
            "5:31: unknown key 'groupsize'\n  hint: did you mean 'group_size'?",
        ),
        ("vision: {}", "5:15: missing key 'scheme'\n  hint: add 'scheme: ...'"),
        ("vision: 8", "5:15: passes.0.quantize.vision must be a mapping, got 8"),
        ("vision: [w8a8]", "5:15: passes.0.quantize.vision must be a mapping, got a list"),
        (
            "vision: {scheme: w4a16, group_size: 32, per_channel: true}",
            "5:47: group_size 32 and per_channel exclude each other\n  hint: remove one of them",
        ),
        (
            "vision: {scheme: w4a16, group_size: 4}",
            "5:43: passes.0.quantize.vision.group_size must be at least 8, got 4",
        ),
        (
            "vision: {scheme: w4a16, group_size: 2048}",
            "5:43: passes.0.quantize.vision.group_size must be at most 1024, got 2048",
        ),
        (
            "vision: {scheme: w4a16, group_size: 32.0}",
            "5:43: passes.0.quantize.vision.group_size must be a whole number, got 32.0",
        ),
        (
            "vision: {scheme: w4a16, method: gptqq}",
            "5:39: passes.0.quantize.vision.method must be one of 'rtn', 'hqq', 'gptq', got "
            "'gptqq'\n  hint: did you mean 'gptq'?",
        ),
        (
            "decoder: {scheme: w8a8, instead: w4a8}",
            "5:31: instead: w4a8 is for w4a16, not for w8a8\n  hint: remove instead",
        ),
        (
            "decoder: {scheme: w8a16, activations: token}",
            "5:32: w8a16 rounds activations to 16 bits or not at all: activations 'token' has no "
            "meaning\n  hint: remove activations",
        ),
        (
            "decoder: {scheme: fp8, symmetric: false}",
            "5:30: symmetric false is about integers, and fp8 has none\n  hint: remove symmetric",
        ),
        (
            "decoder: {scheme: fp8, method: gptq}",
            "5:30: method 'gptq' is about integers, and fp8 has none\n  hint: remove method",
        ),
        (
            "decoder: {scheme: fp8, ranges: mse}",
            "5:30: ranges 'mse' is about integers, and fp8 has none\n  hint: remove ranges",
        ),
        (
            "decoder: {scheme: fp8, activation_ranges: mse}",
            "5:30: activation_ranges 'mse' is about integers, and fp8 has none\n"
            "  hint: choose minmax or percentile",
        ),
        (
            "kv: int16",
            "5:11: passes.0.quantize.kv must be one of 'int8', 'int4', 'float8_e4m3fn', "
            "'float8_e5m2', got 'int16'\n  hint: did you mean 'int8'?",
        ),
        (
            "kv: {dtype: int8, granularity: token}",
            "5:38: passes.0.quantize.kv.granularity must be one of 'tensor', 'channel', got "
            "'token'",
        ),
        (
            "embedding: {dtype: int8, group_size: 24}",
            "5:44: passes.0.quantize.embedding.group_size must be one of 16, 32, 64, 128, 256, "
            "got 24",
        ),
        ("sites: [{match: head, skip: so, scheme: w8a8}]", f"5:15: {RULE}"),
        ("sites: [{match: head}]", f"5:15: {RULE}"),
        ("sites: [{match: head, skip: }]", f"5:15: {RULE}"),
        ("sites: [{match: head, scheme: }]", f"5:15: {RULE}"),
        (
            "sites: [{match: head, skip: ''}]",
            "5:35: passes.0.quantize.sites.0.skip must be a string of at least one character, "
            "got ''",
        ),
        (
            "sites: [{match: '', skip: so}]",
            "5:23: passes.0.quantize.sites.0.match must be a string of at least one character, "
            "got ''",
        ),
        (
            "budget: {finer: [w4a9], max_mib: 5}",
            f"5:24: passes.0.quantize.budget.finer.0 must be one of {NAMES}, got 'w4a9'\n"
            "  hint: did you mean 'w4a8'?",
        ),
        (
            "budget: {finer: [{scheme: w8a8, instead: w4a8}], max_mib: 5}",
            "5:39: instead: w4a8 is for w4a16, not for w8a8\n  hint: remove instead",
        ),
        (
            "budget: {finer: [{schem: w8a8}], max_mib: 5}",
            "5:25: unknown key 'schem'\n  hint: did you mean 'scheme'?",
        ),
        (
            "budget: {finer: [w8a16]}",
            "5:15: a budget has one bound: max_mib or max_accuracy_drop\n"
            "  hint: name one of the two",
        ),
        (
            "budget: {max_mib: .nan}",
            "5:25: passes.0.quantize.budget.max_mib must be a finite number, got nan",
        ),
    ],
)
def test_mistakes(line: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parsed(line)
    assert str(caught.value) == f"recipe.yaml:{expected}"


def test_a_budget_beside_weights_for_prompts() -> None:
    with pytest.raises(RecipeError) as caught:
        parsed("decoder: w4a16", "prefill: w8a8", "budget: {max_mib: 9}")
    assert str(caught.value) == (
        "recipe.yaml:7:7: a budget is for one set of weights, and prefill has its own\n"
        "  hint: remove prefill, or budget"
    )
