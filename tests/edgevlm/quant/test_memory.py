"""Caches, tables and budgets: what a plan says of them, and the spec that they lead to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from edgevlm.decisions import Decision
from edgevlm.model.spec import KvQuant, VlmSpec
from edgevlm.passes import Quantize
from edgevlm.quant.memory import shaped, table_scheme
from edgevlm.quant.options import KvOptions, TableOptions
from edgevlm.quant.spec import Scheme, WeightQuant
from tests.edgevlm.calibrated import context
from tests.edgevlm.tiny import tiny_spec


def told(
    options: dict[str, Any],
    about: str,
    *,
    spec: VlmSpec | None = None,
    targets: tuple[str, ...] = ("ort",),
) -> list[Decision]:
    """The decisions that begin so."""
    step = Quantize.model_validate(options)
    decisions = step.foresee(spec or tiny_spec(), context(targets=targets)).decisions
    return [item for item in decisions if item.asked.startswith(about)]


def test_a_spec_with_cache_and_table() -> None:
    spec = tiny_spec()
    schemes = {"decoder.head": Scheme(name="w8a16", weights=WeightQuant(dtype="int8", bits=8))}
    after = shaped(
        spec,
        schemes,
        KvOptions(dtype="int4", granularity="tensor"),
        TableOptions(dtype="int4", group_size=64),
    )
    kv = KvQuant(dtype="int4", granularity="tensor")
    layers = [
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, kv=kv))
        for layer in spec.decoder.layers
    ]
    assert after == dataclasses.replace(
        spec,
        schemes=schemes,
        decoder=dataclasses.replace(spec.decoder, layers=tuple(layers)),
        table=Scheme(name="w4a16", weights=WeightQuant(dtype="int4", bits=4, group_size=64)),
    )
    assert shaped(spec, {}, None, None) == spec


def test_a_table_has_the_weights_of_a_head_of_its_scheme() -> None:
    """So that one lies where the other is read."""
    spec = Quantize.model_validate({"head": "w4a16"}).foresee(tiny_spec(), context()).spec
    assert table_scheme(TableOptions(dtype="int4")) == spec.schemes["decoder.head"]


# Two layers of keys and values, two heads of 16 features: 128 numbers, 512 bytes of float32.
@pytest.mark.parametrize(
    ("kv", "targets", "size"),
    [
        ("int8", ("ort",), "128"),
        ("int8", ("ort", "static"), "128"),
        ("int4", ("ort",), "64"),
        ("float8_e4m3fn", ("static",), "128"),
        ("float8_e5m2", ("static",), "128"),
    ],
)
def test_bytes_of_a_row_of_a_cache(kv: str, targets: tuple[str, ...], size: str) -> None:
    (found,) = told({"kv": {"dtype": kv, "granularity": "tensor"}}, "kv", targets=targets)
    assert found.asked == f"kv {kv} per tensor"
    slow = (
        "; prompts are read by the step's kernel, whose attention is 2 to 6 times slower over such "
        "a cache: with prefill they have a graph that is not"
    )
    few = f"a row takes {size} bytes of the cache instead of 512"
    assert found.effect == few + (slow if "ort" in targets else "")
    options = {"kv": {"dtype": kv, "granularity": "tensor"}, "prefill": "w8a8"}
    (found,) = told(options, "kv", targets=targets)
    assert found.effect == few


@pytest.mark.parametrize(
    ("kv", "target", "known"),
    [
        ("int4", "static", "int8, float8_e4m3fn, float8_e5m2"),
        ("float8_e4m3fn", "ort", "int8, int4"),
    ],
)
def test_one_target_that_cannot_keep_it_is_enough(kv: str, target: str, known: str) -> None:
    assert told({"kv": kv}, "kv", targets=("ort", "static")) == [
        Decision(
            asked=f"kv {kv} per channel on {target!r}",
            outcome="refused",
            reason=f"its steps keep {known} only",
            effect="choose kv: int8, or another target",
        )
    ]


WIDE = dataclasses.replace(
    tiny_spec(), decoder=dataclasses.replace(tiny_spec().decoder, width=1024, vocab_size=8192)
)


@pytest.mark.parametrize(
    ("options", "tied", "effect"),
    [
        # 8 Mi numbers: 8 MiB of int8 and a float32 scale for each 32, or half of both for int4.
        ({"embedding": "int8"}, True, "9.0 MiB instead of 32.0"),
        ({"embedding": "int4"}, True, "5.0 MiB instead of 32.0"),
        ({"embedding": {"dtype": "int4", "group_size": 128}}, True, "4.2 MiB instead of 32.0"),
        (
            {"embedding": "int4", "head": "w4a16"},
            True,
            "5.0 MiB instead of 32.0, which the head reads too",
        ),
        ({"embedding": "int4", "head": "w4a16"}, False, "5.0 MiB instead of 32.0"),
        ({"embedding": "int4", "head": "w8a16"}, True, "5.0 MiB instead of 32.0"),
    ],
)
def test_what_a_table_saves(options: dict[str, Any], tied: bool, effect: str) -> None:
    spec = dataclasses.replace(WIDE, decoder=dataclasses.replace(WIDE.decoder, tied=tied))
    (found,) = told(options, "embedding", spec=spec)
    assert (found.outcome, found.effect) == ("applied", effect)


@pytest.mark.parametrize(
    ("head", "targets", "shared"),
    [
        ({"scheme": "w8a16", "group_size": 32}, ("ort",), ", which the head reads too"),
        (
            {"scheme": "w8a8", "group_size": 32, "activations": "block"},
            ("ort",),
            ", which the head reads too",
        ),
        # A row that shares a scale has its weights in another layout, and so has a group elsewhere.
        ({"scheme": "w8a8"}, ("ort",), ""),
        ({"scheme": "w8a16"}, ("static",), ""),
        ({"scheme": "w8a16", "group_size": 64}, ("ort",), ""),
        ({"scheme": "w8a16", "group_size": 32, "symmetric": False}, ("ort",), ""),
    ],
)
def test_who_else_reads_the_table(
    head: dict[str, Any], targets: tuple[str, ...], shared: str
) -> None:
    (found,) = told({"embedding": "int8", "head": head}, "embedding", targets=targets, spec=WIDE)
    assert found.effect == f"9.0 MiB instead of 32.0{shared}"


def test_a_head_that_reads_it_on_one_target() -> None:
    options = {"embedding": "int4", "head": "w4a16"}
    (found,) = told(options, "embedding", targets=("ort", "static"), spec=WIDE)
    assert found.effect == "5.0 MiB instead of 32.0, which the head reads too on 'ort'"


# Of the wide decoder: q|k|v [128, 1024], out [1024, 64], gate and up [80, 1024], down [1024, 80].
LEAST = 2 * (128 * 1024 + 1024 * 64 + 3 * 80 * 1024) * (1 / 2 + 4 / 32)
SHORT = 2 * 1024 * 16 * (1 / 2 + 4 / 32)  # what fills the last groups of the down maps


@pytest.mark.parametrize(
    ("budget", "asked", "outcome", "reason", "effect"),
    [
        (
            {"max_mib": 2.0},
            "budget: at most 2 MiB",
            "applied",
            "10 sites may be raised to w8a16, float",
            "linear maps take 0.5 MiB or more, as calibration decides",
        ),
        (
            {"max_accuracy_drop": 0.015, "finer": ("w8a8",)},
            "budget: at most 1.5% of the calibration samples lost",
            "applied",
            "10 sites may be raised to w8a8",
            "linear maps take 0.5 MiB or more, as calibration decides",
        ),
        (
            {"max_mib": 0.25},
            "budget of 0.25 MiB",
            "refused",
            "the coarsest schemes take 0.5 MiB",
            "set budget.max_mib to at least 0.5, or ask for fewer bits",
        ),
    ],
)
def test_what_a_budget_can_come_to(
    budget: dict[str, Any], asked: str, outcome: str, reason: str, effect: str
) -> None:
    assert f"{(LEAST + SHORT) / 2**20:.1f}" == "0.5"
    (found,) = told({"decoder": "w4a16", "budget": budget}, "budget", spec=WIDE)
    assert (found.asked, found.outcome) == (asked, outcome)
    assert (found.reason, found.effect) == (reason, effect)
