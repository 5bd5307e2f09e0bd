"""Schemes as they are asked of graphs, and real graphs of a small model audited for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from edgevlm.audit.asked import asked_of, precision_of
from edgevlm.audit.audit import audit_graph
from edgevlm.audit.precision import Precision
from edgevlm.audit.report import GraphAudit
from edgevlm.model.attention import AttentionCore
from edgevlm.model.graphs import ModelGraph, delta_step, inplace_step, vision_graph
from edgevlm.model.quantized import QuantLinear
from edgevlm.model.spec import KvQuant, VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.quant.sites import linear_sites
from edgevlm.quant.spec import DTYPE_BITS, SCHEMES, ActivationQuant, Scheme, WeightQuant
from edgevlm_export.capture import capture
from edgevlm_export.lower import lower
from edgevlm_export.targets import TARGETS
from edgevlm_export.write import WeightFile, write
from edgevlm_runtime.manifest import GraphSpec
from tests.edgevlm.tiny import tiny_spec


def scheme(name: str, scales: str = "", group_size: int = 0, bits: int = 0) -> Scheme:
    weights, activations = SCHEMES[name]
    return Scheme(
        name=name,
        weights=WeightQuant(dtype=weights, bits=bits or DTYPE_BITS[weights], group_size=group_size),
        activations=ActivationQuant(dtype=activations, scales=scales) if scales else None,
    )


@pytest.mark.parametrize(
    ("given", "emulated", "text"),
    [
        (scheme("w4a16", group_size=32), False, "int4 group:32 x float32"),
        (scheme("w8a16", "static"), False, "int8 channel x float32"),
        (scheme("w8a16", "static"), True, "int8 channel x int16 tensor static, emulated"),
        (scheme("w8a8", "token", bits=7), False, "int8 channel x int8 token"),
        (scheme("w8a8", "tensor"), False, "int8 channel x int8 tensor"),
        (scheme("w8a8", "static"), False, "int8 channel x int8 tensor static"),
        (scheme("w4a8", "block", group_size=32), False, "int4 group:32 x int8 group:32"),
        (scheme("w4a8", "block"), False, "int4 channel x int8 group:128"),
        (
            scheme("fp8", "static"),
            True,
            "float8_e4m3fn channel x float8_e4m3fn tensor static, emulated",
        ),
    ],
)
def test_what_a_scheme_asks(given: Scheme, emulated: bool, text: str) -> None:
    precision = precision_of(given, emulated=emulated)
    assert str(precision) == text
    assert precision.dynamic == ("static" not in text and precision.activations == "int8")


def quantized(spec: VlmSpec) -> Vlm:
    """The model with seeded integers and scales in the place of what a pass would find."""
    torch.manual_seed(0)
    model = Vlm(spec).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, QuantLinear):
                most = 2 ** (module.scheme.weights.bits - 1) - 1
                numbers = rng.integers(-most, most + 1, module.weight.shape)
                module.weight.copy_(torch.tensor(numbers))
                steps = rng.uniform(0.5, 1.0, module.scale.shape) / most
                module.scale.copy_(torch.tensor(steps / np.sqrt(module.weight.shape[1])))
                if module.x_scale is not None:
                    module.x_scale.fill_(0.05)
            if isinstance(module, AttentionCore) and module.k_scale is not None:
                for scale in (module.k_scale, module.v_scale):
                    scale.copy_(torch.tensor(rng.uniform(0.01, 0.05, scale.shape)))
    return model


def small(scheme: Scheme, *roots: str, kv: KvQuant | None = None) -> VlmSpec:
    """A small model, all linear maps under the roots in one scheme, and its cache in another."""
    spec = tiny_spec()
    # The features of the small model are those of its first layer: no graph has the second.
    vision = dataclasses.replace(spec.vision, layers=spec.vision.layers[:1])
    layer = spec.decoder.layers[0]
    layers = (dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, kv=kv)),)
    spec = dataclasses.replace(
        spec, vision=vision, decoder=dataclasses.replace(spec.decoder, layers=layers)
    )
    schemes = {site: scheme for site in linear_sites(spec) if site.startswith(roots)}
    return dataclasses.replace(spec, schemes=schemes)


def audited(made: ModelGraph, spec: VlmSpec, folder: Path, target: str, role: str) -> GraphAudit:
    """The audit of a graph as the compiler writes it."""
    path = folder / "g.onnx"
    with WeightFile(folder / "weights.bin") as weights:
        write(lower(capture(made.module, made.plan), TARGETS[target]), path, weights)
    graph = GraphSpec(
        name="g",
        role=role,
        file=path.name,
        engine=TARGETS[target].engine,
        inputs=made.plan.inputs,
        outputs=made.plan.outputs,
    )
    arrays = {
        given.name: (example.view(torch.uint8) if "float8" in given.dtype else example).numpy()
        for given, example in zip(made.plan.inputs, made.examples, strict=True)
    }
    pasts = [given.name for given in made.plan.inputs if given.source.startswith("state:")]
    news = [given.name for given in made.plan.outputs[1:]]
    in_place = dict(zip(news, pasts, strict=True)) if target == "ort" and pasts else {}
    asked = asked_of(spec, graph, emulated=target == "static")
    return audit_graph(path, graph, arrays, asked, in_place=in_place)


def check(audit: GraphAudit, sites: set[str], kernels: set[str]) -> None:
    """All these sites are as asked, by these kernels, and no op is unknown."""
    assert audit.refused == ""
    assert audit.differences == ()
    asked = [row for row in audit.rows if row.asked is not None]
    assert {row.site for row in asked} == sites
    assert {row.kernel for row in asked} == kernels
    assert all(row.microseconds is not None for row in audit.rows)
    assert {row.name for row in audit.rows if not row.site} == set()


CORE = "decoder.layers.0.attention.core"


def test_a_vision_encoder_of_integers(tmp_path: Path) -> None:
    spec = small(scheme("w8a8", "token", bits=7), "vision.", "projector.")
    audit = audited(vision_graph(quantized(spec)), spec, tmp_path, "ort", "vision")
    check(audit, set(spec.schemes), {"MatMulIntegerToFloat u8 x s8"})
    # Two neighbours of seven bits fit into 16 bits together.
    assert audit.hazards == ()


@pytest.mark.parametrize(
    ("given", "kv", "phase", "kernels"),
    [
        (
            scheme("w4a16", group_size=32),
            KvQuant(dtype="int8", granularity="channel"),
            "decode",
            {"MatMulNBits 4-bit block 32 level 0", "GroupQueryAttention"},
        ),
        (
            scheme("w4a8", "block", group_size=32),
            KvQuant(dtype="int4", granularity="tensor"),
            "prefill",
            {"MatMulNBits 4-bit block 32 level 4", "GroupQueryAttention"},
        ),
    ],
)
def test_a_decoder_over_a_quantized_cache(
    tmp_path: Path, given: Scheme, kv: KvQuant, phase: str, kernels: set[str]
) -> None:
    spec = small(given, "decoder.", kv=kv)
    made = inplace_step(quantized(spec), 32, (phase,))
    audit = audited(made, spec, tmp_path, "ort", "step")
    check(audit, {*spec.schemes, CORE}, kernels)
    found = {str(row.realised) for row in audit.rows if row.site == CORE and row.asked}
    assert found == {f"float32, cache {kv.dtype} {kv.granularity}"}


def test_each_part_of_a_joined_product_is_judged(tmp_path: Path) -> None:
    """Gate and up are one product in a step: what it is, both are; each is asked for its own."""
    spec = small(scheme("w4a16", group_size=32), "decoder.")
    up = "decoder.layers.0.mlp.up"
    made = inplace_step(quantized(spec), 32, ("decode",))
    eight = dataclasses.replace(spec, schemes={**spec.schemes, up: scheme("w8a16")})
    audit = audited(made, eight, tmp_path, "ort", "step")
    rows = {row.site: row for row in audit.rows if row.asked is not None}
    assert rows["decoder.layers.0.mlp.gate"].outcome == "as asked"
    assert rows[up].name == f"{up} of decoder.layers.0.mlp.gate/joined"
    assert [row.site for row in audit.differences] == [up]
    assert rows[up].outcome == "coarser"
    assert rows[up].cause == ("weights are int4, asked int8: so the file has them")


def test_pairs_for_another_device(tmp_path: Path) -> None:
    spec = small(
        scheme("w8a16", "static"), "decoder.", kv=KvQuant(dtype="int8", granularity="channel")
    )
    audit = audited(delta_step(quantized(spec), 32, 4), spec, tmp_path, "static", "step")
    assert audit.differences == ()
    asked = {row.site: str(row.realised) for row in audit.rows if row.asked}
    assert set(asked) == {*spec.schemes, CORE}
    linear = {asked[site] for site in spec.schemes}
    assert linear == {"int8 channel x int16 tensor static, emulated"}


def test_prompts_have_schemes_of_their_own() -> None:
    spec = small(scheme("w4a16", group_size=32), "decoder.")
    prompts = {
        site.replace("decoder.", "prefill."): scheme("w8a8", "token")
        for site in spec.schemes
        if site != "decoder.head"
    }
    spec = dataclasses.replace(spec, schemes={**spec.schemes, **prompts})
    engine = TARGETS["ort"].engine
    graphs = {
        phase: GraphSpec(
            name=phase,
            role="step",
            file="g",
            engine=engine,
            inputs=(),
            outputs=(),
            phases=(phase,),
        )
        for phase in ("prefill", "decode")
    }
    asked = {phase: asked_of(spec, graph, emulated=False) for phase, graph in graphs.items()}
    assert set(asked["prefill"]) == set(asked["decode"])
    w4 = Precision(weights="int4", weight_granularity="group:32", activations="float32")
    assert asked["prefill"]["decoder.head"] == asked["decode"]["decoder.head"] == w4
    assert asked["decode"]["decoder.layers.0.mlp.up"] == w4
    assert str(asked["prefill"]["decoder.layers.0.mlp.up"]) == "int8 channel x int8 token"
