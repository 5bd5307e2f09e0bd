"""Schemes of sites: what a device and its targets make of a wish, and what a plan says of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from edgevlm.decisions import Decision
from edgevlm.device import load_device, parse_device
from edgevlm.errors import PassError
from edgevlm.model.spec import VlmSpec
from edgevlm.quant.assign import scheme_of
from edgevlm.quant.options import SiteOptions
from edgevlm.quant.sites import linear_sites
from edgevlm.quant.spec import ActivationQuant, Scheme, WeightQuant
from edgevlm.resources import device_files
from tests.edgevlm.quant.assigning import BOTH, HOST, ORT, STATIC, assigned, said, wish
from tests.edgevlm.tiny import drawn, native_spec, tiny_spec


@pytest.mark.parametrize(
    "spec",
    [tiny_spec(), tiny_spec(tied=False, head_norms=True), native_spec((4, 6))],
    ids=["tied", "untied", "native"],
)
def test_sites_are_the_linear_maps_of_the_module(spec: VlmSpec) -> None:
    """All of them, with their shapes, in the order in which they run."""
    from torch import nn

    model = drawn(spec)
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    sites = linear_sites(spec)
    assert {site: (linear.rows, linear.columns) for site, linear in sites.items()} == shapes
    assert {linear.component for linear in sites.values()} == {
        "vision",
        "projector",
        "decoder",
        "head",
    }
    assert list(sites) == [name for name in shapes if name != "decoder.head"] + ["decoder.head"]


STATIC8 = ActivationQuant(dtype="int8", scales="static")
STATIC16 = ActivationQuant(dtype="int16", scales="static")


@pytest.mark.parametrize(
    ("asked", "targets", "weights", "activations"),
    [
        ({"scheme": "w8a8"}, ORT, ("int8", 7, 0), ActivationQuant(dtype="int8", scales="token")),
        ({"scheme": "w8a8"}, STATIC, ("int8", 8, 0), STATIC8),
        ({"scheme": "w8a8"}, BOTH, ("int8", 7, 0), STATIC8),
        (
            {"scheme": "w8a8", "activations": "tensor"},
            ORT,
            ("int8", 7, 0),
            ActivationQuant(dtype="int8", scales="tensor"),
        ),
        (
            {"scheme": "w8a8", "group_size": 64},
            ORT,
            ("int8", 8, 64),
            ActivationQuant(dtype="int8", scales="block"),
        ),
        ({"scheme": "w8a16"}, ORT, ("int8", 8, 0), None),
        ({"scheme": "w8a16"}, STATIC, ("int8", 8, 0), STATIC16),
        ({"scheme": "w4a16"}, ORT, ("int4", 4, 32), None),
        ({"scheme": "w4a16", "group_size": 128}, ORT, ("int4", 4, 128), None),
        ({"scheme": "w4a16", "per_channel": True}, STATIC, ("int4", 4, 0), STATIC16),
        (
            {"scheme": "w4a8"},
            ORT,
            ("int4", 4, 32),
            ActivationQuant(dtype="int8", scales="block"),
        ),
        (
            {"scheme": "w4a8", "per_channel": True},
            ORT,
            ("int4", 4, 0),
            ActivationQuant(dtype="int8", scales="token"),
        ),
        ({"scheme": "w4a8"}, STATIC, ("int4", 4, 32), STATIC8),
        (
            {"scheme": "w4a16", "instead": "w4a8"},
            ORT,
            ("int4", 4, 32),
            ActivationQuant(dtype="int8", scales="block"),
        ),
        ({"scheme": "w16a16"}, STATIC, ("int16", 16, 0), STATIC16),
        (
            {"scheme": "fp8"},
            STATIC,
            ("float8_e4m3fn", 8, 0),
            ActivationQuant(dtype="float8_e4m3fn", scales="static"),
        ),
    ],
)
def test_a_wish_is_settled_by_device_and_targets(
    asked: dict[str, Any],
    targets: tuple[str, ...],
    weights: tuple[str, int, int],
    activations: ActivationQuant | None,
) -> None:
    dtype, bits, group_size = weights
    assert scheme_of(wish(**asked), HOST, targets) == Scheme(
        name=asked.get("instead", asked["scheme"]),
        weights=WeightQuant(dtype=dtype, bits=bits, group_size=group_size),
        activations=activations,
    )


@pytest.mark.parametrize(
    ("asked", "weights", "activations"),
    [
        ("w8a8", ("int8", 8, 0), dataclasses.replace(STATIC8, symmetric=True)),
        ("w4a16", ("int4", 4, 64), None),
        ("w8a16", ("int8", 8, 0), None),
    ],
)
def test_tensorrt_has_no_zero_points_and_larger_groups(
    asked: str, weights: tuple[str, int, int], activations: ActivationQuant | None
) -> None:
    """Activations asked in 16 bits stay floats there; groups are the smallest that it has."""
    dtype, bits, group_size = weights
    assert scheme_of(wish(asked), load_device("jetson-thor"), ("tensorrt",)) == Scheme(
        name=asked,
        weights=WeightQuant(dtype=dtype, bits=bits, group_size=group_size),
        activations=activations,
    )


def test_a_device_that_is_exact_for_eight_bits_gets_them() -> None:
    path = device_files()["host-cpu"]
    text = path.read_text()
    exact = parse_device(text.replace("    value: 7\n", "    value: 8\n"), path)
    assert scheme_of(wish("w8a8"), exact, ORT).weights.bits == 8
    assert said(assigned(vision=wish("w8a8"), device=exact))[0].outcome == "applied"


def test_components_phases_and_rules() -> None:
    """The last rule that matches wins, over component and phase; the order is the model's."""
    made = assigned(
        ORT,
        SiteOptions(match="*.layers.0.mlp.*", skip="first"),
        SiteOptions(match="decoder.layers.0.mlp.up", scheme=wish("w8a16")),
        SiteOptions(match="prefill.layers.1.attention.*", skip="loud"),
        vision=wish("w8a8"),
        decoder=wish("w4a16"),
        prefill=wish("w8a8"),
    )
    names = {site: scheme.name for site, scheme in made.schemes.items()}
    attention, mlp = ("attention.qkv", "attention.out"), ("mlp.gate", "mlp.up", "mlp.down")
    assert names == {
        **{f"vision.layers.0.{part}": "w8a8" for part in attention},
        **{f"vision.layers.1.{part}": "w8a8" for part in (*attention, "mlp.up", "mlp.down")},
        **{f"decoder.layers.0.{part}": "w4a16" for part in attention},
        "decoder.layers.0.mlp.up": "w8a16",
        **{f"decoder.layers.1.{part}": "w4a16" for part in (*attention, *mlp)},
        **{f"prefill.layers.0.{part}": "w8a8" for part in attention},
        **{f"prefill.layers.1.{part}": "w8a8" for part in mlp},
    }
    assert list(made.schemes) == list(made.options) == list(names)
    assert {site: options.scheme for site, options in made.options.items()} == names
    assert made.skipped == {
        "vision.layers.0.mlp.up": "first",
        "vision.layers.0.mlp.down": "first",
        "projector.up": "no scheme is asked for projector",
        "projector.down": "no scheme is asked for projector",
        "decoder.layers.0.mlp.gate": "first",
        "decoder.layers.0.mlp.down": "first",
        "decoder.head": "no scheme is asked for head",
        **{f"prefill.layers.0.{part}": "first" for part in mlp},
        **{f"prefill.layers.1.{part}": "loud" for part in attention},
    }


NAMES = "maps have names as 'vision.layers.0.attention.qkv' and 'decoder.head'"


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        (
            "decoder.layers.0.mlp.dwon",
            "did you mean 'decoder.layers.0.mlp.down'?",
        ),
        ("vision.*.qkv.*", NAMES),
        ("Decoder.Head", "did you mean 'decoder.head'?"),
        ("nothing", NAMES),
        (
            "prefill.layers.0.*",
            "name a scheme for prefill; without one the decoder's maps read prompts too",
        ),
    ],
)
def test_a_rule_that_matches_nothing(pattern: str, hint: str) -> None:
    with pytest.raises(PassError) as caught:
        assigned(ORT, SiteOptions(match=pattern, skip="so"), vision=wish("w8a8"))
    assert str(caught.value) == (
        f"quantize: {pattern!r} matches none of the 21 linear maps\n  hint: {hint}"
    )


def test_decisions_of_what_is_done() -> None:
    made = assigned(
        ORT,
        SiteOptions(match="decoder.layers.1.mlp.*", scheme=wish("w8a16")),
        vision=wish("w8a8"),
        decoder=wish("w4a16", instead="w4a8"),
        head=wish("w4a16"),
    )
    # In MiB: vision 2 (96 x 32 + 32 x 32 + 2 x 48 x 32) 4 = 57,344 bytes, and so on.
    assert said(made) == [
        Decision(
            asked="quantize vision w8a8",
            outcome="degraded",
            reason="host-cpu is exact for weights of 7 bits: they are kept to these",
            effect="8 linear maps, 0.1 MiB as float32, 0.0 MiB as w8a8 channel 7-bit token",
        ),
        Decision(
            asked="quantize decoder w4a16",
            outcome="degraded",
            reason="w4a8 was named in its place: activations are rounded to int8",
            effect="7 linear maps, 0.2 MiB as float32, 0.0 MiB as w4a8 group:32 block; 1 maps end "
            "in a short group, the first is decoder.layers.0.mlp.down",
        ),
        Decision(
            asked="quantize decoder w8a16",
            outcome="applied",
            reason="host-cpu computes it on ort",
            effect="3 linear maps, 0.1 MiB as float32, 0.0 MiB as w8a16 channel",
        ),
        Decision(
            asked="quantize head w4a16",
            outcome="applied",
            reason="host-cpu computes it on ort",
            effect="1 linear maps, 0.0 MiB as float32, 0.0 MiB as w4a16 group:32",
        ),
    ]


def test_sizes_are_those_of_weights_and_scales() -> None:
    """A wide decoder, so that megabytes show: 2 layers of a fused q|k|v, out, gate, up, down."""
    spec = tiny_spec()
    decoder = spec.decoder
    wide = dataclasses.replace(
        spec, decoder=dataclasses.replace(decoder, width=1024, vocab_size=4096)
    )
    numbers = 2 * (128 * 1024 + 1024 * 64 + 3 * 80 * 1024)
    # 4 bits and a float32 scale for 32 of them; the down map [1024, 80] ends in a group of 16.
    whole = numbers - 2 * 1024 * 80 + 2 * 1024 * 96
    found = said(assigned(spec=wide, decoder=wish("w4a16")))
    assert [item.effect for item in found] == [
        f"10 linear maps, {4 * numbers / 2**20:.1f} MiB as float32, "
        f"{(whole / 2 + 4 * whole / 32) / 2**20:.1f} MiB as w4a16 group:32; 2 maps end in a short "
        "group, the first is decoder.layers.0.mlp.down"
    ]
    assert f"{4 * numbers / 2**20:.1f}" == "3.4"
    assert f"{(whole / 2 + 4 * whole / 32) / 2**20:.1f}" == "0.5"


def test_a_rule_with_instead_is_told_apart_from_one_without() -> None:
    """Both come to one scheme, and only one was asked for something else."""
    made = assigned(
        ORT,
        SiteOptions(match="decoder.layers.1.*", scheme=wish("w4a16", instead="w4a8")),
        decoder=wish("w4a8"),
    )
    assert len(set(made.schemes.values())) == 1
    assert [(item.asked, item.outcome) for item in said(made)] == [
        ("quantize decoder w4a8", "applied"),
        ("quantize decoder w4a16", "degraded"),
    ]


def test_weights_for_prompts_say_what_they_cost_and_gain() -> None:
    found = said(assigned(decoder=wish("w4a16"), prefill=wish("w8a8")))[1]
    assert (found.asked, found.outcome) == ("quantize prefill w8a8", "degraded")
    assert found.effect == (
        "10 linear maps, 0.2 MiB as float32, 0.1 MiB as w8a8 channel 7-bit token, held beside the "
        "weights of decode; predicted from host-cpu's peaks, 256 rows take 0 ms of products "
        "instead of 0"
    )


def test_what_is_predicted_follows_from_the_peaks() -> None:
    """2 M K N operations at 340 and at 164 GOP/s."""
    spec = tiny_spec()
    layer = spec.decoder.layers[0]
    large = dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, width=200_000))
    decoder = dataclasses.replace(spec.decoder, layers=(large,))
    wide = dataclasses.replace(spec, decoder=decoder)
    numbers = 128 * 64 + 64 * 64 + 3 * 200_000 * 64
    found = said(assigned(spec=wide, decoder=wish("w4a16"), prefill=wish("w8a8")))[1]
    ours, theirs = (2e3 * 256 * numbers / (speed * 1e9) for speed in (340, 164))
    assert found.effect.endswith(f"256 rows take {ours:.0f} ms of products instead of {theirs:.0f}")
    assert (round(ours), round(theirs)) == (58, 120)
