"""Quantized models as graphs: what ONNX Runtime makes of each map is what torch makes of it.

Each map is held to its module on the very numbers that the graph fed it, so nothing is lost on the
way there: then both round alike, and only the order of float32 sums differs. From end to end a
number that lies between two steps of a grid may be rounded to different ones, because it comes from
sums in another order; one such flip moves what follows by a step, so whole graphs are held to their
noise, far under that of quantization.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgevlm.evidence.bisect import site_outputs
from edgevlm.evidence.fault import tapped_runs
from edgevlm.evidence.measures import sqnr_db
from edgevlm.graphs import graph_file, manifest_variant, module_of, write_graphs
from edgevlm.model.graphs import ModelGraph
from edgevlm.model.quantized import QuantLinear
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes import run_pass
from edgevlm.plan import make_plan, recipe_device
from edgevlm.progress import Silent
from edgevlm.recipe import parse_recipe
from edgevlm_export.taps import tapped_sites
from edgevlm_export.targets import TARGETS
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode.decoder import open_decoder
from edgevlm_runtime.decode.protocol import Prompt
from edgevlm_runtime.engine import Engines
from edgevlm_runtime.engines.table import open_table
from tests.edgevlm.calibrated import context, samples_of
from tests.edgevlm.tiny import drawn, tiny_spec
from tests.runtime.bundles import write_manifest

CAPACITY = 40
# Outputs of size 3, sums of up to 80 products in float32; scales of blocks are multiplied in there.
SAME_INPUT = 3e-5
# Where nothing is rounded on the way, logits and pictures differ by the order of sums alone.
SAME_FLOATS = 1e-4
# A few flips among the thousands of numbers that a graph rounds; quantization itself is at 35 dB.
WHOLE_DB = 42.0

# Every kind of map that a target has, in as few graphs as hold them: captures take their time.
CASES: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "ort, activations rounded": (
        "ort",
        WHOLE_DB,
        (
            "vision: w8a8",
            "projector: {scheme: w8a8, group_size: 16}",
            "decoder: {scheme: w8a8, activations: static}",
            "head: w8a8",
            "sites:",
            "  - {match: vision.*.attention.out, scheme: {scheme: w8a8, activations: tensor}}",
            "  - {match: vision.*.mlp.down, scheme: {scheme: w8a8, symmetric: false}}",
            "  - {match: decoder.*.attention.out, scheme: {scheme: w4a8, per_channel: true}}",
            "  - {match: decoder.*.mlp.gate, scheme: {scheme: w4a16, instead: w4a8}}",
            "  - {match: decoder.*.mlp.up, scheme: {scheme: w8a8, symmetric: false}}",
            "  - {match: decoder.*.mlp.down, scheme: {scheme: w8a8, symmetric: false,",
            "                                         activations: static}}",
        ),
    ),
    "ort, activations in float": (
        "ort",
        90.0,
        (
            "vision: w8a16",
            "projector: {scheme: w8a16, group_size: 64, symmetric: false}",
            "decoder: w4a16",
            "head: {scheme: w8a16, symmetric: false}",
            "sites: [{match: '*.mlp.up', scheme: {scheme: w4a16, group_size: 16,",
            "         symmetric: false, method: gptq}}]",
        ),
    ),
    "static, integers": (
        "static",
        WHOLE_DB,
        (
            "vision: w8a8",
            "projector: {scheme: w8a16, symmetric: false}",
            "decoder: {scheme: w4a8, group_size: 16}",
            "head: w8a8",
            "sites:",
            "  - {match: vision.*.mlp.*, scheme: {scheme: w8a8, symmetric: false}}",
            "  - {match: projector.down, scheme: w16a16}",
            "  - {match: decoder.*.attention.out, scheme: {scheme: w16a16, symmetric: false}}",
            "  - {match: decoder.*.mlp.gate, scheme: {scheme: w4a16, group_size: 64}}",
            "  - {match: decoder.*.mlp.up, scheme: {scheme: w4a8, per_channel: true}}",
            "  - {match: decoder.*.mlp.down, scheme: {scheme: w4a8, symmetric: false}}",
        ),
    ),
    "static, float8": (
        "static",
        35.0,  # a step of its larger numbers is an eighth of them
        ("vision: fp8", "projector: fp8", "decoder: fp8", "head: fp8"),
    ),
    "tensorrt": (
        "tensorrt",
        35.0,
        (
            "vision: fp8",
            "projector: w8a8",
            "decoder: w4a16",
            "head: w8a8",
            "sites: [{match: decoder.*.attention.*, scheme: fp8}]",
        ),
    ),
}


def one_layer(*, tied: bool = True) -> VlmSpec:
    """A vision encoder and a decoder of one layer each."""
    spec = tiny_spec(tied=tied)
    decoder = dataclasses.replace(spec.decoder, layers=spec.decoder.layers[:1])
    vision = dataclasses.replace(spec.vision, layers=spec.vision.layers[:1])
    return dataclasses.replace(spec, vision=vision, decoder=decoder)


def device_of(target: str) -> str:
    """A device that has the target."""
    return "jetson-thor" if target == "tensorrt" else "host-cpu"


class Case:
    """A model quantized as a recipe says, and its graphs, written as a compile writes them.

    Of a static target there is that of eight rows. `floor` is the least SQNR of whole graphs.
    """

    floor = 0.0

    def __init__(
        self,
        folder: Path,
        target: str,
        *options: str,
        spec: VlmSpec | None = None,
        graphs: Sequence[str] = ("vision", "prefill", "step", "step_8"),
    ) -> None:
        spec = spec or one_layer()
        lines = "".join(f"      {line}\n" for line in options)
        recipe = parse_recipe(
            f"model: a/b\ndevice: {device_of(target)}\ntargets: [{target}]\n"
            f"context: {{capacity: {CAPACITY}}}\npasses:\n  - quantize:\n{lines}"
        )
        self.folder, self.target = folder, target
        self.model: Vlm = drawn(spec)
        plan = make_plan(recipe, recipe_device(recipe), spec)
        (variant,) = plan.variants
        kept = tuple(graph for graph in variant.graphs if graph.name in graphs)
        self.variant = dataclasses.replace(variant, graphs=kept)
        self.plan = dataclasses.replace(plan, variants=(self.variant,))
        here = context(samples_of(spec, 4), targets=(target,), device=device_of(target))
        run_pass(recipe.passes[0], self.model, here)
        assert self.model.spec == self.plan.spec
        folder.mkdir()
        write_graphs(self.model, self.plan, folder, Silent())

    def graphs(self) -> Iterator[tuple[ModelGraph, Path]]:
        """Every graph's module, and its file."""
        for planned in self.variant.graphs:
            made = module_of(self.model, self.variant, planned)
            yield made, self.folder / graph_file(self.variant, planned)

    def run(self, made: ModelGraph, path: Path, values: Sequence[str]) -> dict[str, np.ndarray]:
        """These values of a graph, run on the examples of its module."""
        feeds = {
            spec.name: example.numpy()
            for spec, example in zip(made.plan.inputs, made.examples, strict=True)
        }
        options = TARGETS[self.target].engine.options
        return tapped_runs(path, values, [feeds], options)[0]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    target, floor, options = CASES[request.param]
    made = Case(tmp_path_factory.mktemp("case") / "graphs", target, *options)
    made.floor = floor
    return made


def source_of(site: str) -> str | None:
    """The site that a map reads, where there is one."""
    owner, _, name = site.rpartition(".")
    if site in ("projector.up", "vision.embed.patch"):
        return None
    return {
        "qkv": f"{owner.removesuffix('.attention')}.norm1",
        "out": f"{owner}.core",
        "gate": f"{owner.removesuffix('.mlp')}.norm2",
        "up": f"{owner.removesuffix('.mlp')}.norm2",
        "down": f"{owner}.act",
        "head": f"{owner}.norm",
    }[name]


def test_each_map_is_its_module_on_the_numbers_that_the_graph_feeds_it(case: Case) -> None:
    compared = set()
    for made, path in case.graphs():
        modules = dict(made.module.named_modules())
        known = set(tapped_sites(ir.load(path)))
        pairs = {
            site: source
            for site, module in modules.items()
            if isinstance(module, QuantLinear) and (source := source_of(site)) in known
            if site in known or site == "decoder.head"
        }
        names = {site: made.plan.outputs[0].name if site not in known else site for site in pairs}
        wanted = list(dict.fromkeys([*names.values(), *(str(each) for each in pairs.values())]))
        values = case.run(made, path, wanted)
        for site, source in pairs.items():
            read = torch.from_numpy(values[str(source)])
            module = modules[site]
            assert isinstance(module, QuantLinear)
            with torch.no_grad():
                want = module(read.reshape(1, -1, module.weight.shape[1])).flatten().numpy()
            error = np.abs(values[names[site]].ravel() - want).max()
            assert error <= SAME_INPUT, (path.name, site)
        compared |= set(pairs)
    # What feeds the first map of the projector is no site.
    assert set(case.model.spec.schemes) - compared == {"projector.up"}


def test_whole_graphs_are_the_module(case: Case) -> None:
    """At the logits and the visual tokens, and at every site on the way."""
    for made, path in case.graphs():
        modules = {name for name, _ in made.module.named_modules()}
        sites = [site for site in tapped_sites(ir.load(path)) if site in modules]
        output = made.plan.outputs[0].name
        want = site_outputs(made.module, sites, lambda made=made: made.module(*made.examples))
        got = case.run(made, path, [*sites, output])
        with torch.no_grad():
            found = made.module(*made.examples)
        want[output] = (found[0] if isinstance(found, tuple) else found).numpy()
        assert got[output].shape == want[output].shape
        noises = {name: sqnr_db(want[name], got[name]) for name in want}
        # A single site may have its flips where few numbers are.
        assert min(noises.values()) > case.floor - 4, (path.name, noises)
        assert noises[output] > case.floor
        if case.floor == CASES["ort, activations in float"][1]:
            np.testing.assert_allclose(got[output], want[output], atol=SAME_FLOATS, rtol=0)


def test_tensorrt_has_no_zero_points_and_no_other_types(tmp_path: Path) -> None:
    """What a strongly typed network is built from: types of the file, and scales alone."""
    target, _, options = CASES["tensorrt"]
    made = Case(tmp_path / "graphs", target, *options)
    quantized = {ir.DataType.INT4: 0, ir.DataType.INT8: 0, ir.DataType.FLOAT8E4M3FN: 0}
    for _, path in made.graphs():
        for node in ir.load(path).graph:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            x, scale, *zeros = node.inputs
            kind = node.outputs[0] if node.op_type == "QuantizeLinear" else x
            assert kind is not None
            assert scale is not None
            assert scale.dtype == ir.DataType.FLOAT
            quantized[kind.dtype] += 1
            if kind.dtype == ir.DataType.INT4:
                assert node.attributes["block_size"].value == 64
            for zero in zeros:
                assert zero is not None
                assert zero.const_value is not None
                assert not zero.const_value.numpy().astype(np.float32).any()
    assert all(quantized.values()), quantized


def bundle_of(case: Case) -> Bundle:
    made = manifest_variant(case.plan, case.variant)
    return Bundle.open(write_manifest(case.folder, {case.target: made}))


TWO_PHASES = ("prefill: w8a8", "decoder: w4a16", "head: w8a16")


@pytest.mark.parametrize("target", ["ort", "static"])
def test_prompts_and_tokens_have_graphs_of_their_own_weights(tmp_path: Path, target: str) -> None:
    """Run as a session runs them: the prompt by one, each token by the other, over one cache."""
    graphs = ("prefill", "step", "step_1", "step_32")
    case = Case(tmp_path / "bundle", target, *TWO_PHASES, graphs=graphs)
    steps = {graph.name: graph.phases for graph in case.variant.graphs if graph.role == "step"}
    if target == "ort":
        assert steps == {"prefill": ("prefill",), "step": ("decode", "verify")}
    else:
        assert steps == {"step_1": ("decode", "verify"), "step_32": ("prefill",)}
    bundle = bundle_of(case)
    table = open_table(bundle, bundle.variant.graphs[0])
    decoder = open_decoder(bundle, Engines(bundle), table)
    tokens = [index * 7 % 90 for index in range(CAPACITY - 4)]
    length = 20
    prompt = Prompt(
        embeds=table.rows(np.array(tokens[:length])),
        positions=np.arange(length),
        next_position=length,
    )
    rows = [decoder.prefill(prompt).logits[-1].copy()]
    rows += [decoder.extend([token]).logits[-1].copy() for token in tokens[length:]]
    model = case.model
    with torch.no_grad():
        embeds = model.embedding(torch.tensor(tokens))[None]
        want = model.answer(embeds, torch.arange(len(tokens)), length).numpy()
        other = model.whole(model.decoder, embeds, torch.arange(len(tokens)))[0, length - 1 :]
    got = np.stack(rows)
    assert sqnr_db(want, got) > WHOLE_DB
    # Other weights for the prompt would be seen in the first row, and in the cache by all others.
    assert sqnr_db(want, other.numpy()) < 30
    assert (got.argmax(axis=1) == want.argmax(axis=1)).mean() > 0.9


def test_a_packed_head_lies_in_the_table(tmp_path: Path) -> None:
    """By the sizes of the files, and by what the graph says of its weights."""
    options = ("embedding: int4", "head: {scheme: w4a16, method: gptq}")
    shared = Case(tmp_path / "shared", "ort", *options, graphs=("step",))
    untied = one_layer(tied=False)
    apart = Case(tmp_path / "apart", "ort", *options, spec=untied, graphs=("step",))
    codes = 96 * 64 // 2
    for case, is_shared in ((shared, True), (apart, False)):
        step = ir.load(case.folder / "ort.step.onnx")
        (product,) = (node for node in step.graph if str(node.name).startswith("decoder.head"))
        assert product.op_type == "MatMulNBits"
        packed = product.inputs[1]
        assert packed is not None
        tensor = packed.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.length == codes
        assert tensor.location == ("embedding.npy" if is_shared else "weights.bin")
        made = next(g for g in manifest_variant(case.plan, case.variant).graphs if g.name == "step")
        assert made.weights == (
            ("weights.bin", "embedding.npy", "embedding.scales.npy")
            if is_shared
            else ("weights.bin",)
        )
    sizes = [(case.folder / "weights.bin").stat().st_size for case in (shared, apart)]
    # Every tensor begins on a page.
    assert sizes[1] - sizes[0] >= codes
    assert (shared.folder / "embedding.npy").stat().st_size - codes in range(64, 256)
    for case in (shared, apart):
        decoder_of = bundle_of(case)
        table = open_table(decoder_of, decoder_of.variant.graphs[0])
        decoder = open_decoder(decoder_of, Engines(decoder_of), table)
        ids = np.arange(5, 17)
        prompt = Prompt(embeds=table.rows(ids), positions=np.arange(12), next_position=12)
        got = decoder.prefill(prompt).logits[-1]
        with torch.no_grad():
            rows = case.model.embedding(torch.from_numpy(ids))[None]
            want = case.model(rows, torch.arange(12))[0, -1].numpy()
        np.testing.assert_allclose(got, want, atol=SAME_FLOATS, rtol=0)
