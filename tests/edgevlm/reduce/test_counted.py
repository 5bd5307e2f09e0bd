"""I9: what a plan says a prompt costs is what the products of the exported graphs come to.

Products are counted on the ONNX files by their shapes. A static step compares every row with all
slots of its cache besides the rows of the call, in products of their own (`past_`), which hold
zeros in a first prompt: those are no part of the plan's numbers, and are held against the mask.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgevlm.device import load_device
from edgevlm.graphs import manifest_variant, module_of
from edgevlm.model.spec import VlmSpec
from edgevlm.plan import Plan, PlannedGraph, make_plan
from edgevlm.recipe import parse_recipe
from edgevlm.reduce.cost import kv_bytes, prefill_macs
from edgevlm_export.capture import capture
from edgevlm_export.lower import lower
from edgevlm_export.targets import TARGETS
from edgevlm_export.write import WeightFile, write
from tests.edgevlm.tiny import drawn, tiny_spec

CAPACITY = 160
RECIPE = "model: owner/name\ndevice: host-cpu\ntargets: [static]\ncontext: {capacity: 160}\n"


@dataclass(frozen=True)
class Product:
    """A product of a graph: its node, its multiply-adds, and the rows it works on."""

    name: str
    macs: int
    rows: int


def products(path: Path) -> list[Product]:
    """Every MatMul, Gemm and Conv of a file, by the shapes that are written in it."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = [size.dim_value for size in value.type.tensor_type.shape.dim]
    found = []
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        left, right, out = (shapes[name] for name in (*node.input[:2], node.output[0]))
        assert all(size > 0 for size in (*left, *right, *out)), node.name
        # What one number of the output is the sum of.
        terms = math.prod(right[1:]) if node.op_type == "Conv" else left[-1]
        found.append(Product(node.name, math.prod(out) * terms, out[-2]))
    return found


def planned(passes: str, spec: VlmSpec, text_rows: int = 64) -> Plan:
    recipe = parse_recipe(RECIPE + passes)
    return make_plan(recipe, load_device("host-cpu"), spec, text_rows)


def written(plan: Plan, graph: PlannedGraph, folder: Path) -> Path:
    """A graph of the plan, exported as a compile does it."""
    made = module_of(drawn(plan.spec), plan.variants[0], graph)
    with WeightFile(folder / "weights.bin") as weights:
        write(
            lower(capture(made.module, made.plan), TARGETS["static"]),
            folder / "graph.onnx",
            weights,
        )
    return folder / "graph.onnx"


def deep_spec() -> VlmSpec:
    """Three layers of vision, all of which are used, and five of the decoder."""
    spec = tiny_spec()
    vision = dataclasses.replace(
        spec.vision, layers=spec.vision.layers[:1] * 3, feature_layers=(3,)
    )
    decoder = dataclasses.replace(spec.decoder, layers=spec.decoder.layers[:1] * 5)
    return dataclasses.replace(spec, vision=vision, decoder=decoder)


AT_STAGES = ("decoder.cuts.", "decoder.skips.", "decoder/")
CUT = "{{at: decoder, layer: {}, keep: {}, score: {{text_attention: {}}}, select: top, place: {}}}"
PREVIOUS = "{layer: previous}"
DECODERS = {
    "one cut": [CUT.format(2, 6, PREVIOUS, "keep")],
    "two cuts": [CUT.format(1, 9, PREVIOUS, "keep"), CUT.format(3, 2, "{rope: off}", "keep")],
    "all or nothing": [
        CUT.format(1, 16, "{query: question}", "repack"),
        CUT.format(3, 0, "{query: question}", "repack"),
    ],
    "raters, and what is recycled": [
        CUT.format(1, 12, "{query: raters, rope: corrected, top_heads: 2}", "keep"),
        "{at: decoder, layer: 3, keep: 6, score: {text_attention: {query: raters}}, select: top, "
        "rest: {recycle: {per_cluster: 2}}, place: repack}",
    ],
    "predicted": [
        "{at: decoder, layer: 2, keep: 6, score: {predictor: {width: 16, heads: 2, query: text}}, "
        "select: top}"
    ],
    "pivots, then a difference of layers": [
        "{at: decoder, layer: 1, keep: 10, select: {pivots: {visual: 2, text: 3}}}",
        "{at: decoder, layer: 3, keep: 4, score: attention_delta, select: top}",
    ],
    "ever fewer pass": [
        "{at: decoder, schedule: cosine, score: router, select: top, skip: reweighted}"
    ],
    "some pass every second layer": [
        "{at: decoder, keep: 3, schedule: every, score: router, select: top, skip: gated}"
    ],
    "all pass, and are weighed": [
        "{at: decoder, keep: 16, schedule: every, score: router, select: top, skip: gated}"
    ],
    "a contrast, relevant and diverse": [
        "{at: decoder, layer: 2, keep: 6, score: contrast, select: {relevant_diverse: {key: 2}}}"
    ],
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_with_cuts(name: str, tmp_path: Path) -> None:
    passes = f"passes: [{{reduce: {{stages: [{', '.join(DECODERS[name])}]}}}}]\n"
    rough = planned(passes, deep_spec())
    graph = next(graph for graph in rough.variants[0].graphs if graph.phases == ("picture",))
    assert graph.rows is not None
    # The plan's prompt has as many rows as this graph: one picture of 16 tokens, and text.
    plan = planned(passes, deep_spec(), text_rows=graph.rows - 16)
    path = written(plan, graph, tmp_path)
    found = products(path)
    rows = [segment.rows for segment in plan.tokens.segments for _ in layers_of(segment)]
    slots = [segment.capacity for segment in plan.tokens.segments for _ in layers_of(segment)]
    assert plan.spec.reduction is not None
    if not plan.spec.reduction.skips:
        assert len(plan.tokens.segments) == len(DECODERS[name]) + 1

    own, probes, past = sorted_out(found, rows)
    assert plan.tokens.cost.prefill == sum(product.macs for product in own)
    # All slots, whether used or not, as the mask input has them.
    masks = mask_shapes(path)
    groups = {part.group: part for part in reversed(plan.tokens.segments)}
    assert sorted(masks) == sorted((x.rows, x.capacity + x.rows) for x in groups.values())
    width = plan.spec.decoder.layers[0].attention.q_width
    assert sum(product.macs for product in past) == sum(
        2 * count * free * width for count, free in zip(rows, slots, strict=True)
    )
    seen = [count + free for count, free in zip(rows, slots, strict=True)]
    assert prefill_macs(plan.spec.decoder, rows, seen) == sum(x.macs for x in (*own, *past))
    # `kept_rows` adds up gaps by a product, where a target has no NonZero: bookkeeping.
    # Who looks at pictures is found before the layers, at no site of a cut.
    at_cuts = [x for x in found if x.name.startswith(AT_STAGES)]
    cuts = [product for product in at_cuts if "kept_rows" not in product.name]
    assert plan.tokens.cost.choosing == sum(product.macs for product in (*cuts, *probes))


def layers_of(segment: Any) -> range:
    return range(segment.first, segment.end)


def sorted_out(
    found: Sequence[Product], rows: Sequence[int]
) -> tuple[list[Product], list[Product], list[Product]]:
    """Products of the layers, projections of a layer for a cut before it, and unused slots."""
    own, probes, past = list[Product](), list[Product](), list[Product]()
    for product in found:
        part, _, site = product.name.partition("decoder.layers.")
        if part or not site:
            continue
        if "/past_" in site:
            past.append(product)
        elif ".qkv" in site and product.rows != rows[int(site.split(".")[0])]:
            probes.append(product)
        else:
            own.append(product)
    return own, probes, past


def mask_shapes(path: Path) -> list[tuple[int, int]]:
    """Rows and columns of the masks that a graph is fed."""
    inputs = onnx.load(path, load_external_data=False).graph.input
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in inputs
        if value.name.startswith("attn_mask")
    }
    return [(shape[2], shape[3]) for shape in shapes.values()]


def test_a_prompt_without_cuts(tmp_path: Path) -> None:
    plan = planned("", deep_spec(), text_rows=32 - 16)
    graph = next(graph for graph in plan.variants[0].graphs if graph.rows == 32)
    own, probes, past = sorted_out(products(written(plan, graph, tmp_path)), [32] * 5)
    assert probes == []
    assert plan.tokens.cost.prefill == sum(product.macs for product in own)
    assert prefill_macs(plan.spec.decoder, [32] * 5, [CAPACITY + 32] * 5) == sum(
        product.macs for product in (*own, *past)
    )


def test_a_prompt_with_a_bottleneck(tmp_path: Path) -> None:
    """All rows pass all layers, and the mask and the state have those that stay."""
    passes = "passes: [{reduce: {stages: [{at: projector, keep: 3, bottleneck: learned_rows}]}}]\n"
    rough = planned(passes, deep_spec())
    graph = next(graph for graph in rough.variants[0].graphs if graph.phases == ("picture",))
    assert graph.rows is not None
    plan = planned(passes, deep_spec(), text_rows=graph.rows - 19)
    path = written(plan, graph, tmp_path)
    found = products(path)
    own, probes, past = sorted_out(found, [graph.rows] * 5)
    assert probes == []
    assert plan.tokens.cost.prefill == sum(product.macs for product in own)
    assert mask_shapes(path) == [(graph.rows - 16, CAPACITY + graph.rows - 16)]
    seen = [graph.rows + CAPACITY] * 5
    assert prefill_macs(plan.spec.decoder, [graph.rows] * 5, seen) == sum(
        product.macs for product in (*own, *past)
    )
    rest = [x for x in found if x not in (*own, *past) and "kept_rows" not in x.name]
    hiding = [x for x in rest if not x.name.startswith(("decoder.head", "decoder.norm"))]
    assert plan.tokens.cost.choosing == sum(product.macs for product in hiding)


ENCODERS = {
    "merging in every layer": ["{at: encoder.layers, keep: 7, merge: bipartite}"],
    "fusing in two layers, then clusters": [
        "{at: encoder.layers, layers: [0, 1], keep: 9, merge: {fuse: {every: 3}}}",
        "{at: projector, keep: 4, merge: clusters}",
    ],
    "windows in a layer, then merging in rounds": [
        "{at: encoder.layers, layers: [1], keep: 4, transform: windows}",
        "{at: encoder, keep: 2, merge: {bipartite: {metric: features, rounds: 2}}}",
    ],
    "neighbours, then a determinant": [
        "{at: encoder, keep: 9, score: encoder_attention, select: top, rest: {neighbours: "
        "{count: 3}}}",
        "{at: projector, keep: 5, select: dpp}",
    ],
    "selection and anchors": [
        "{at: encoder, keep: 6, score: encoder_attention, select: top, rest: {anchors: "
        "{share: 0.3}}}"
    ],
    "anchors of a pool": [
        "{at: encoder, keep: 6, score: {encoder_attention: {by: all, heads: one}}, select: top, "
        "rest: {anchors: {share: 0.3, pool: 3}}}"
    ],
    "frequencies, spread, and a facility": [
        "{at: encoder, keep: 9, transform: fourier}",
        "{at: projector, keep: 7, select: spread}",
        "{at: projector, keep: 5, select: facility}",
    ],
    "merging nothing": [
        "{at: encoder.layers, keep: 16, merge: bipartite}",
        "{at: projector, keep: 16, merge: clusters}",
    ],
    "fusing nothing": ["{at: encoder.layers, layers: [1], keep: 16, merge: fuse}"],
    "queries that look at tokens": ["{at: encoder, keep: 4, merge: resample}"],
    "registers, predicted by the question": [
        "{at: encoder, keep: 9, merge: {registers: {heads: 4}}}",
        "{at: projector, keep: 4, score: {predictor: {width: 16, query: question}}, select: top}",
    ],
    "text that sees the picture": [
        "{at: encoder, keep: 4, merge: {resample: {heads: 4}}}], fusion: {layers: 2}"
    ],
    "means, then cover": [
        "{at: encoder, keep: 9, transform: elastic}",
        "{at: projector, keep: 4, select: cover}",
    ],
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_picture(name: str, tmp_path: Path) -> None:
    stages = ", ".join(ENCODERS[name])
    closing = "" if "fusion" in stages else "]"
    passes = f"passes: [{{reduce: {{stages: [{stages}{closing}}}}}]\n"
    # A static vision graph is shown 64 rows of the question, where it is shown any.
    plan = planned(passes, deep_spec(), text_rows=64)
    found = products(written(plan, plan.variants[0].graphs[0], tmp_path))
    vision = [x for x in found if x.name.startswith(("vision.embed.", "vision.layers."))]
    projector = [x for x in found if x.name.startswith("projector.")]
    choosing = [x for x in found if x not in vision and x not in projector]
    assert plan.tokens.cost.vision == sum(product.macs for product in vision)
    assert plan.tokens.cost.projector == sum(product.macs for product in projector)
    assert plan.tokens.cost.choosing == sum(product.macs for product in choosing)


QUANTIZED = "{quantize: {kv: int8}}"


@pytest.mark.parametrize(("name", "kv"), [("two cuts", ""), ("two cuts", QUANTIZED), ("none", "")])
def test_bytes_of_the_state(name: str, kv: str, tmp_path: Path) -> None:
    """Of the manifest's state tensors, and of the inputs of the graph that reads them."""
    stages = DECODERS.get(name, [])
    steps = [f"{{reduce: {{stages: [{', '.join(stages)}]}}}}"] if stages else []
    steps += [kv] if kv else []
    plan = planned(f"passes: [{', '.join(steps)}]\n", deep_spec())
    (variant,) = plan.variants
    slots = [part.capacity for part in plan.tokens.segments for _ in layers_of(part)]
    expected = kv_bytes(plan.spec.decoder, slots)
    groups = manifest_variant(plan, variant).state
    assert sum(group.nbytes for group in groups) == expected == variant.memory.state
    assert [(group.name, group.capacity) for group in groups] == [
        (part.group, part.capacity) for part in plan.tokens.segments
    ]
    graph = next(graph for graph in variant.graphs if graph.rows == 1)
    inputs = onnx.load(written(plan, graph, tmp_path), load_external_data=False).graph.input
    held = 0
    for value in inputs:
        if value.name.startswith("past_"):
            tensor = value.type.tensor_type
            size = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            held += math.prod(size.dim_value for size in tensor.shape.dim) * size
    assert held == expected
