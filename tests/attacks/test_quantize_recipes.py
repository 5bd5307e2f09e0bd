"""Hostile quantization in recipes: refused in one line, or planned and done; nothing else."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from edgevlm.decisions import refuse
from edgevlm.device import load_device
from edgevlm.errors import DeviceError, EdgeVlmError, PassError, RecipeError
from edgevlm.model.spec import VlmSpec
from edgevlm.passes import Quantize, run_pass
from edgevlm.plan import Plan, make_plan, recipe_device
from edgevlm.quant.assign import Wishes, assign
from edgevlm.quant.options import SchemeOptions
from edgevlm.recipe import Recipe, parse_recipe
from tests.attacks.test_recipe import as_yaml
from tests.edgevlm.calibrated import context, samples_of
from tests.edgevlm.tiny import drawn, tiny_spec

HEAD = "model: owner/name\ndevice: host-cpu\n"
KEYS = (*Quantize.model_fields, "scheme", "dtype", "match", "skip", "group_size", "finer", "x")
WORDS = (
    *("w4a16", "w8a8", "fp8", "int8", "int4", "float8_e4m3fn", "gptq", "static", "token", "float"),
    *("nan", "NaN", ".nan", ".inf", "-.inf", "1e400", "-1", "0", "99999999999999999999", "''"),
    *("decoder.*", "vision.layers.[", "*", "[!", "head\n", "null", "~", "true", "2026-01-01"),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=6)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=8,
)


def one_layer() -> VlmSpec:
    spec = tiny_spec()
    decoder = dataclasses.replace(spec.decoder, layers=spec.decoder.layers[:1])
    vision = dataclasses.replace(spec.vision, layers=spec.vision.layers[:1])
    return dataclasses.replace(spec, vision=vision, decoder=decoder)


SPEC = one_layer()


def planned(text: str) -> tuple[Recipe, Plan]:
    recipe = parse_recipe(text)
    return recipe, make_plan(recipe, recipe_device(recipe), SPEC)


def refused_or_planned(text: str) -> None:
    """One clause and a hint, whatever is wrong; any other error is a failure."""
    refusal: EdgeVlmError | None = None
    try:
        planned(text)
    except (RecipeError, PassError) as error:
        refusal = error
    if refusal is not None:
        message = str(refusal).split("\n  hint: ")[0]
        assert "\n" not in message
        assert isinstance(refusal, PassError) or message.startswith("recipe.yaml")


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_options_with_any_values(options: dict[str, Any]) -> None:
    step = as_yaml({"quantize": options}, "    ").strip()
    refused_or_planned(f"{HEAD}passes:\n  - {step}\n")


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_anything_in_the_place_of_options(value: object) -> None:
    step = as_yaml({"quantize": value}, "    ").strip()
    refused_or_planned(f"{HEAD}passes:\n  - {step}\n")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            "{vision: {scheme: w4a16, group_size: 99999999999999999999}}",
            "passes.0.quantize.vision.group_size must be at most 1024, got "
            "99999999999999999999",
        ),
        (
            "{vision: {scheme: w4a16, group_size: -32}}",
            "passes.0.quantize.vision.group_size must be at least 8, got -32",
        ),
        (
            "{vision: {scheme: w4a16, group_size: 0}}",
            "passes.0.quantize.vision.group_size must be at least 8, got 0",
        ),
        (
            "{vision: {scheme: w4a16, group_size: .nan}}",
            "passes.0.quantize.vision.group_size must be a whole number, got nan",
        ),
        (
            "{vision: {scheme: w4a16, group_size: 'NaN'}}",
            "passes.0.quantize.vision.group_size must be a whole number, got 'NaN'",
        ),
        (
            "{vision: {scheme: w4a16, group_size: true}}",
            "passes.0.quantize.vision.group_size must be a whole number, got true",
        ),
        (
            "{vision: {scheme: [w4a16, w8a8]}}",
            "passes.0.quantize.vision.scheme must be one of 'w4a16', 'w4a8', 'w8a16', "
            "'w8a8', 'w16a16', 'fp8', got a list",
        ),
        (
            "{vision: {scheme: w8a8, symmetric: 'no'}}",
            "passes.0.quantize.vision.symmetric must be true or false, got 'no'",
        ),
        (
            "{bias_correction: 1, vision: w8a8}",
            "passes.0.quantize.bias_correction must be true or false, got 1",
        ),
        ("{kv: {dtype: 8}}", "passes.0.quantize.kv.dtype must be one of 'int8', 'int4', "
         "'float8_e4m3fn', 'float8_e5m2', got 8"),
        (
            "{sites: {match: x, skip: y}}",
            "passes.0.quantize.sites must be a list, got a mapping",
        ),
        (
            "{sites: [decoder.head], vision: w8a8}",
            "passes.0.quantize.sites.0 must be a mapping, got 'decoder.head'",
        ),
        (
            "{budget: {max_mib: -1}, vision: w8a8}",
            "passes.0.quantize.budget.max_mib must be more than 0.0, got -1",
        ),
        (
            "{budget: {max_accuracy_drop: 2}, vision: w8a8}",
            "passes.0.quantize.budget.max_accuracy_drop must be at most 1.0, got 2",
        ),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind(options: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(f"{HEAD}passes:\n  - quantize: {options}\n")
    place, _, clause = str(caught.value).split("\n  hint: ")[0].partition(": ")
    assert place.startswith("recipe.yaml:4:")
    assert clause == expected


@pytest.mark.parametrize("value", ["0", "-1", "10001", ".nan", "many"])
def test_numbers_of_samples(value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(f"{HEAD}calibration: {{samples: {value}}}\n")
    assert str(caught.value).startswith("recipe.yaml:3:24: calibration.samples must be ")


def test_a_pattern_cannot_stall_the_plan() -> None:
    """Patterns of many stars take exponential time where each is tried against each."""
    pattern = "*a" * 40 + "b"
    started = time.perf_counter()
    with pytest.raises(PassError) as caught:
        planned(f"{HEAD}passes:\n  - quantize:\n      sites: [{{match: '{pattern}', skip: x}}]\n")
    assert time.perf_counter() - started < 2.0
    assert str(caught.value).startswith(f"quantize: {pattern!r} matches none of the 12 linear maps")


PARTS = ("vision", "projector", "decoder", "prefill", "head")
TARGETS = {"ort": ("ort",), "static": ("static",), "ort, static": ("ort", "static")}
HOW = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(["rtn", "hqq", "gptq"]),
        "ranges": st.sampled_from(["minmax", "percentile", "mse"]),
        "activation_ranges": st.sampled_from(["minmax", "percentile", "mse"]),
    },
)
KINDS: tuple[dict[str, Any], ...] = (
    *({"scheme": scheme} for scheme in ("w4a16", "w8a16", "w8a8", "w16a16", "fp8", "w4a8")),
    {"scheme": "w4a16", "group_size": 16, "symmetric": False},
    {"scheme": "w4a16", "group_size": 128, "instead": "w4a8"},
    {"scheme": "w4a16", "per_channel": True},
    {"scheme": "w4a8", "per_channel": True, "symmetric": False},
    {"scheme": "w8a8", "activations": "static", "symmetric": False},
    {"scheme": "w8a8", "activations": "tensor"},
    {"scheme": "w8a8", "group_size": 64},
)


def accepted(name: str) -> list[dict[str, Any]]:
    """Kinds that a plan for these targets accepts for the encoder."""
    return [
        kind
        for kind in KINDS
        if not any(
            decision.outcome == "refused"
            for decision in assign(
                Wishes(components={"vision": SchemeOptions.model_validate(kind)}),
                SPEC,
                load_device("host-cpu"),
                TARGETS[name],
            ).decisions
        )
    ]


@functools.cache
def recipes(name: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """Options for these targets, most of which a plan accepts."""
    kinds = st.tuples(st.sampled_from(accepted(name)), HOW).map(
        lambda pair: pair[0] if pair[0]["scheme"] == "fp8" else {**pair[0], **pair[1]}
    )
    matches = st.sampled_from(["decoder.*", "'*.mlp.*'", "vision.*", "'*.out'", "decoder.head"])
    rules = st.one_of(
        st.fixed_dictionaries({"match": matches, "skip": st.just("so")}),
        st.fixed_dictionaries({"match": matches, "scheme": kinds}),
    )
    options = st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(PARTS, kinds),
            "kv": st.just("int8"),
            "embedding": st.sampled_from(["int8", "int4"]),
            "bias_correction": st.booleans(),
            "sites": st.lists(rules, max_size=2),
        },
    )
    return st.tuples(st.just(name), options)


CASES = samples_of(SPEC, 2)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(TARGETS)).flatmap(recipes))
def test_what_a_plan_accepts_the_pass_does(drawn_options: tuple[str, dict[str, Any]]) -> None:
    """The model is then that of the plan."""
    name, options = drawn_options
    step = as_yaml({"quantize": options}, "    ").strip()
    try:
        recipe, plan = planned(f"{HEAD}targets: [{name}]\npasses:\n  - {step}\n")
        refuse(plan.decisions)
    except (PassError, DeviceError) as refusal:
        event(str(refusal)[:40])
        return
    event("accepted")
    model = drawn(SPEC)
    change = run_pass(recipe.passes[0], model, context(CASES, targets=TARGETS[name]))
    assert model.spec == plan.spec
    assert set(change.schemes) == set(plan.spec.schemes)
    sites = set(change.schemes) | {"embedding", "decoder.layers.0.attention.core"}
    assert set(change.sites) <= sites
    assert all(bool(torch.isfinite(x.float()).all()) for x in model.parameters())
