"""quantize: foreseen from the spec alone, applied, kept as a stage, and put in place again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgevlm.decisions import Decision, refuse
from edgevlm.errors import DeviceError, PassError
from edgevlm.model.quantized import QuantEmbedding, QuantLinear
from edgevlm.model.spec import KvQuant
from edgevlm.passes import FoldNorms
from edgevlm.passes.quantize import PATCHES
from edgevlm.plan import make_plan, recipe_device
from edgevlm.quant.affine import float8_scales, to_float8
from edgevlm.quant.rtn import rtn
from edgevlm.quant.spec import ActivationQuant, Scheme, WeightQuant
from edgevlm.recipe import parse_recipe
from tests.edgevlm.calibrated import context, quantized
from tests.edgevlm.passes.quantizing import EVERYTHING, foreseen
from tests.edgevlm.tiny import drawn, native_spec, tiny_spec


def test_the_spec_after_it() -> None:
    spec = tiny_spec()
    options = {"decoder": "w4a16", "prefill": "w8a8", "kv": {"dtype": "int4"}, "embedding": "int8"}
    after = foreseen(options).spec
    assert {scheme for site, scheme in after.schemes.items() if site.startswith("decoder.")} == {
        Scheme(name="w4a16", weights=WeightQuant(dtype="int4", bits=4, group_size=32))
    }
    assert {scheme for site, scheme in after.schemes.items() if site.startswith("prefill.")} == {
        Scheme(
            name="w8a8",
            weights=WeightQuant(dtype="int8", bits=7),
            activations=ActivationQuant(dtype="int8", scales="token"),
        )
    }
    assert len(after.schemes) == 20
    assert after.has_prefill
    assert {layer.attention.kv for layer in after.decoder.layers} == {
        KvQuant(dtype="int4", granularity="channel")
    }
    assert after.table == Scheme(
        name="w8a16", weights=WeightQuant(dtype="int8", bits=8, group_size=32)
    )
    assert (after.vision, after.projector) == (spec.vision, spec.projector)
    assert not spec.is_quantized
    assert after.is_quantized


def test_a_table_alone_and_a_cache_alone_are_quantized() -> None:
    assert foreseen({"embedding": "int8"}).spec.is_quantized
    assert foreseen({"kv": "int8"}).spec.is_quantized


@pytest.mark.parametrize("options", [{}, {"vision": None}, {"strict": True}])
def test_nothing_to_do_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(PassError) as caught:
        foreseen(options)
    assert str(caught.value) == (
        "quantize: it quantizes nothing\n  hint: name a scheme for vision, projector, decoder or "
        "head, or remove the pass"
    )


def test_twice_is_an_error() -> None:
    spec = foreseen({"kv": "int8"}).spec
    with pytest.raises(PassError) as caught:
        foreseen({"vision": "w8a8"}, spec=spec)
    assert str(caught.value) == (
        "quantize: the model is quantized already\n  hint: make one of the two passes"
    )


def test_norms_are_folded_before() -> None:
    spec = foreseen({"vision": "w8a8"}).spec
    with pytest.raises(PassError) as caught:
        FoldNorms().foresee(spec, context())
    assert str(caught.value) == (
        "fold_norms: the maps that read norms are quantized already\n"
        "  hint: put fold_norms before quantize"
    )


@pytest.mark.parametrize(
    ("kv", "target", "reason"),
    [
        ("float8_e4m3fn", "ort", "its steps keep int8, int4 only"),
        ("float8_e5m2", "ort", "its steps keep int8, int4 only"),
        ("int4", "static", "its steps keep int8, float8_e4m3fn, float8_e5m2 only"),
    ],
)
def test_a_cache_that_no_step_keeps_is_refused_by_the_plan(
    kv: str, target: str, reason: str
) -> None:
    """As a decision among the others: the rest of the plan is shown."""
    text = f"model: a/b\ndevice: host-cpu\ntargets: [{target}]\npasses:\n  - quantize: {{kv: {kv}}}"
    recipe = parse_recipe(f"{text}\n")
    plan = make_plan(recipe, recipe_device(recipe), tiny_spec())
    refused = [decision for decision in plan.decisions if decision.outcome == "refused"]
    assert refused == [
        Decision(
            asked=f"kv {kv} per channel on {target!r}",
            outcome="refused",
            reason=reason,
            effect="choose kv: int8, or another target",
        )
    ]
    assert plan.variants[0].graphs
    with pytest.raises(DeviceError) as caught:
        refuse(plan.decisions)
    assert str(caught.value) == (
        f"kv {kv} per channel on {target!r} is refused: {reason}\n"
        "  hint: choose kv: int8, or another target"
    )


def test_decisions_of_cache_and_table() -> None:
    options = {"embedding": "int4", "head": "w4a16", "kv": "int4", "prefill": "w8a8"}
    decisions = foreseen(options).decisions
    cache, table = (
        next(item for item in decisions if item.asked.startswith(name))
        for name in ("kv", "embedding")
    )
    # Two layers, key and value, two heads of 16: 128 numbers.
    assert cache == Decision(
        asked="kv int4 per channel",
        outcome="applied",
        reason="scales are constants from calibration",
        effect="a row takes 64 bytes of the cache instead of 512",
    )
    assert table == Decision(
        asked="embedding int4",
        outcome="applied",
        reason="the runtime restores rows as they are looked up",
        effect="0.0 MiB instead of 0.0, which the head reads too",
    )


def test_what_a_budget_may_choose_is_refused_by_the_plan() -> None:
    options = {"vision": "w4a16", "budget": {"finer": ("w8a16", "w16a16", "fp8"), "max_mib": 9.0}}
    refused = [item.asked for item in foreseen(options).decisions if item.outcome == "refused"]
    assert refused == ["quantize vision w16a16 on 'ort'", "quantize vision fp8 on 'ort'"]


def test_what_it_reports() -> None:
    model = drawn(tiny_spec())
    change = quantized(model, EVERYTHING)
    assert change.sites == (
        *foreseen(EVERYTHING).spec.schemes,
        "decoder.layers.0.attention.core",
        "decoder.layers.1.attention.core",
        "embedding",
    )
    assert change.skipped == {
        "vision.layers.1.mlp.up": "both are left",
        "decoder.layers.0.mlp.down": "it does the most harm",
        "decoder.layers.1.mlp.up": "both are left",
        "prefill.layers.1.mlp.up": "both are left",
        "vision.embed.patch": PATCHES,
    }
    assert change.schemes["vision.layers.0.mlp.up"] == {
        "name": "w8a8",
        "weights": {"dtype": "int8", "bits": 7, "group_size": 0, "symmetric": True},
        "activations": {"dtype": "int8", "scales": "token", "symmetric": False},
    }
    assert set(change.schemes) == set(model.spec.schemes)
    numbers = {site: model.get_submodule(site).get_parameter("weight") for site in change.schemes}
    sizes = {
        site: model.spec.schemes[site].weights.nbytes(*weight.shape)
        for site, weight in numbers.items()
    }
    assert change.measures == {
        "mib_float32": sum(4 * weight.numel() for weight in numbers.values()) / 2**20,
        "mib_quantized": sum(sizes.values()) / 2**20,
        "samples": 3.0,
    }
    assert model.spec == foreseen(EVERYTHING).spec


def test_patches_that_come_flat_are_a_linear_map() -> None:
    model = drawn(native_spec((4, 6)))
    change = quantized(model, {"vision": "w8a16"}, [])
    assert change.sites[0] == "vision.embed.patch"
    assert change.skipped.keys().isdisjoint({"vision.embed.patch"})


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({"scheme": "w8a8"}, ("ort",)),
        ({"scheme": "w8a8", "symmetric": False}, ("ort",)),
        ({"scheme": "w8a16", "ranges": "mse"}, ("ort",)),
        ({"scheme": "w4a16", "group_size": 16, "symmetric": False}, ("ort",)),
        ({"scheme": "w4a16", "group_size": 128}, ("ort",)),
        ({"scheme": "w4a16", "instead": "w4a8"}, ("ort",)),
        ({"scheme": "w4a8", "per_channel": True}, ("static",)),
        ({"scheme": "w16a16", "ranges": "percentile"}, ("static",)),
    ],
    ids=str,
)
def test_weights_are_those_of_the_numerics(
    options: dict[str, Any], targets: tuple[str, ...]
) -> None:
    """Of every linear map, by the numerics called with what the scheme says."""
    plain, model = drawn(tiny_spec()), drawn(tiny_spec())
    parts = ("vision", "projector", "decoder", "head")
    quantized(model, dict.fromkeys(parts, options), targets=targets)
    assert len(model.spec.schemes) == 21
    for site, scheme in model.spec.schemes.items():
        module = model.get_submodule(site)
        assert isinstance(module, QuantLinear)
        want = rtn(
            plain.get_submodule(site).get_parameter("weight").detach(),
            bits=scheme.weights.bits,
            group_size=scheme.weights.group_size,
            symmetric=options.get("symmetric", True),
            # Four bits are searched for the least error.
            ranges=options.get("ranges", "mse" if scheme.weights.bits == 4 else "minmax"),
        )
        assert torch.equal(module.weight, want.values), site
        assert torch.equal(module.scale, want.scale), site
        assert (module.zero is None) == (want.zero is None)
        assert want.zero is None or torch.equal(module.zero, want.zero), site
        bias = plain.get_submodule(site).bias
        assert (module.bias is None) == (bias is None)
        assert bias is None or torch.equal(module.bias, bias), site


def test_float8_weights_are_those_of_the_numerics() -> None:
    plain, model = drawn(tiny_spec()), drawn(tiny_spec())
    quantized(model, {"decoder": "fp8"}, targets=("static",))
    for site in model.spec.schemes:
        weight = plain.get_submodule(site).get_parameter("weight").detach()
        want = to_float8(weight, float8_scales(weight))
        module = model.get_submodule(site)
        assert isinstance(module, QuantLinear)
        assert torch.equal(module.weight.view(torch.uint8), want.values.view(torch.uint8))
        assert torch.equal(module.scale, want.scale)


def test_the_table_is_rounded_in_groups() -> None:
    plain, model = drawn(tiny_spec()), drawn(tiny_spec())
    quantized(model, {"embedding": {"dtype": "int4", "group_size": 16}}, [])
    table = model.embedding
    assert isinstance(table, QuantEmbedding)
    weight = plain.embedding.weight.detach()
    want = rtn(weight, bits=4, group_size=16, symmetric=True, ranges="mse")
    assert torch.equal(table.weight, want.values)
    ids = torch.tensor([[5, 90], [0, 5]])
    assert torch.equal(table(ids), want.dequantize()[ids])
    # The head was the table; it keeps its floats.
    assert torch.equal(model.decoder.head.weight, plain.embedding.weight)


@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq"])
def test_a_tied_head_of_the_same_weights_is_the_table(method: str) -> None:
    """There is one set of numbers, those of the head's method; others have two."""
    head = {"scheme": "w4a16", "method": method}
    one, two = drawn(tiny_spec()), drawn(tiny_spec(tied=False))
    for model in (one, two):
        quantized(model, {"embedding": "int4", "head": head})
    for name in ("weight", "scale"):
        table, read = (part.get_parameter(name) for part in (one.embedding, one.decoder.head))
        assert table is read
        apart, own = (part.get_parameter(name) for part in (two.embedding, two.decoder.head))
        assert apart is not own
    weight = drawn(tiny_spec()).embedding.weight.detach()
    nearest = rtn(weight, bits=4, group_size=32, symmetric=True, ranges="mse")
    assert torch.equal(one.decoder.head.weight, nearest.values) == (method == "rtn")
    assert torch.equal(two.embedding.weight, nearest.values)


def test_the_model_does_not_change_where_it_is_refused() -> None:
    model = drawn(tiny_spec())
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        model.vision.layers[0].mlp.up.weight[0, 0] = torch.nan
    with pytest.raises(PassError):
        quantized(model, {"vision": "w8a8", "decoder": "w4a16"})
    for name, weight in model.named_parameters():
        assert name == "vision.layers.0.mlp.up.weight" or torch.equal(weight, before[name])
