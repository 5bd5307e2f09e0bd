"""Bytes of quantized models: of weights as they are stored, of tables, and of what both share."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from edgevlm.model.spec import VlmSpec
from edgevlm.passes import Quantize
from edgevlm.plan import make_plan, recipe_device
from edgevlm.quant.spec import WeightQuant
from edgevlm.recipe import parse_recipe
from edgevlm.sizes import shares_table, table_bytes, weight_bytes
from tests.edgevlm.calibrated import context, quantized
from tests.edgevlm.tiny import drawn, tiny_spec


def spec_after(options: dict[str, Any], *, tied: bool = True) -> VlmSpec:
    return Quantize.model_validate(options).foresee(tiny_spec(tied=tied), context()).spec


def test_bytes_of_weights_are_those_of_the_module() -> None:
    """Integers, packed where they have 4 bits, scales, and zeros in a byte each."""
    options = {
        "vision": "w8a8",
        "decoder": {"scheme": "w4a16", "symmetric": False},
        "prefill": "w8a8",
        "head": "w8a16",
    }
    model = drawn(tiny_spec())
    quantized(model, options)
    spec = model.spec

    def stored(*roots: str) -> int:
        total = 0
        for site, scheme in spec.schemes.items():
            if site.startswith(roots):
                module = model.get_submodule(site)
                rows, columns = module.get_parameter("weight").shape
                groups = module.get_parameter("scale").shape[1]
                size = scheme.weights.group_size or columns
                bits = 4 if scheme.weights.dtype == "int4" else 8
                zeros = 0 if scheme.weights.symmetric else rows * groups
                total += rows * groups * size * bits // 8 + 4 * rows * groups + zeros
        return total

    assert weight_bytes(spec, "vision") == stored("vision.")
    assert weight_bytes(spec, "decoder.layers") == stored("decoder.layers")
    assert weight_bytes(spec, "prefill.layers") == stored("prefill.layers") > 0
    assert weight_bytes(spec, "decoder.head") == 96 * 64 + 96 * 4
    assert weight_bytes(spec, "projector") == 4 * (32 * 64 + 64 * 64)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (WeightQuant(dtype="int8", bits=8), 10 * 40 + 10 * 4),
        (WeightQuant(dtype="int8", bits=7, symmetric=False), 10 * 40 + 10 * 4 + 10),
        # Two groups of 32, the second filled up.
        (WeightQuant(dtype="int4", bits=4, group_size=32), 10 * 64 // 2 + 10 * 2 * 4),
        (WeightQuant(dtype="int16", bits=16), 10 * 40 * 2 + 10 * 4),
        (WeightQuant(dtype="float8_e4m3fn", bits=8), 10 * 40 + 10 * 4),
    ],
)
def test_bytes_of_a_matrix(weights: WeightQuant, expected: int) -> None:
    assert weights.nbytes(10, 40) == expected


def test_weights_of_prompts_are_in_the_plan_of_memory() -> None:
    """Both sets lie in the file, and each graph holds its own."""
    text = "model: a/b\ndevice: host-cpu\ntargets: [ort]\ncontext: {capacity: 64}\npasses:\n"
    options = ("decoder: w4a16", "decoder: w4a16, prefill: w8a8")
    one, two = (
        make_plan(recipe, recipe_device(recipe), tiny_spec())
        for recipe in (parse_recipe(f"{text}  - quantize: {{{each}}}\n") for each in options)
    )
    decode, prompt = (weight_bytes(two.spec, f"{root}.layers") for root in ("decoder", "prefill"))
    assert prompt > decode > 0
    (alone,), (both,) = one.variants, two.variants
    assert both.memory.weights - alone.memory.weights == prompt
    head_and_norms = 4 * 96 * 64 + 4 * 5 * 64
    assert both.memory.packed - alone.memory.packed == prompt + head_and_norms
    assert [graph.name for graph in both.graphs] == ["vision", "prefill", "step"]


@pytest.mark.parametrize(
    ("options", "tied", "form", "expected"),
    [
        ({"vision": "w8a8"}, True, "inplace", True),
        ({"vision": "w8a8"}, False, "inplace", False),
        ({"head": {"scheme": "w8a16", "group_size": 32}}, True, "inplace", False),
        ({"embedding": "int8"}, True, "inplace", False),
        ({"embedding": "int8", "head": {"scheme": "w8a16", "group_size": 32}}, True, "inplace", 1),
        ({"embedding": "int8", "head": {"scheme": "w8a16", "group_size": 32}}, False, "inplace", 0),
        ({"embedding": "int8", "head": {"scheme": "w8a16", "group_size": 32}}, True, "delta", 0),
        ({"embedding": "int8", "head": {"scheme": "w8a16", "group_size": 64}}, True, "inplace", 0),
        ({"embedding": "int8", "head": "w8a16"}, True, "inplace", False),
        ({"embedding": "int8", "head": {"scheme": "w8a8", "group_size": 32}}, True, "inplace", 1),
        ({"embedding": "int4", "head": "w4a16"}, True, "inplace", True),
        (
            {"embedding": "int4", "head": {"scheme": "w4a16", "symmetric": False}},
            True,
            "inplace",
            0,
        ),
    ],
)
def test_who_reads_the_table(
    options: dict[str, Any], tied: bool, form: str, expected: bool
) -> None:
    assert shares_table(spec_after(options, tied=tied), form) == bool(expected)


def test_bytes_of_a_table() -> None:
    spec = tiny_spec()
    assert table_bytes(spec) == 96 * 64 * 4
    assert table_bytes(spec_after({"embedding": "int8"})) == 96 * 64 + 96 * 2 * 4
    four = {"embedding": {"dtype": "int4", "group_size": 16}}
    assert table_bytes(spec_after(four)) == 96 * 32 + 96 * 4 * 4
    narrow = dataclasses.replace(spec, decoder=dataclasses.replace(spec.decoder, width=40))
    after = Quantize.model_validate({"embedding": "int4"}).foresee(narrow, context()).spec
    assert table_bytes(after) == 96 * 32 + 96 * 2 * 4
