"""A quantized model from a checkpoint to an audited bundle: compiled once, for one target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from edgevlm.audit.bundle import audit_of
from edgevlm.audit.report import AS_ASKED, COARSER, NOT_REALISED, GraphAudit
from edgevlm.cache import StageCache
from edgevlm.compile import Job, compile_recipe, file_entries
from edgevlm.errors import EvidenceError
from edgevlm.model.spec import VlmSpec
from edgevlm.plan import Plan
from edgevlm.progress import Silent
from edgevlm.recipe import load_recipe
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.manifest import Variant
from edgevlm_runtime.session import Session

RECIPE = """\
model: tiny
device: host-cpu
targets: [ort]
context: {capacity: 256}
passes:
  - fold_norms: {}
  - quantize:
      vision: w8a8
      projector: {scheme: w8a8, activations: static}
      prefill: w8a8
      decoder: w4a16
      head: {scheme: w8a16, group_size: 32}
      embedding: int8
      kv: int8
      sites: [{match: vision.layers.0.mlp.down, skip: a test}]
      strict: true
calibration: {samples: 2}
evidence:
  samples: 2
  max_new_tokens: 4
  quantized: {kl: 10.0, argmax_agreement: 0.01}
"""
STEP = "ort.step.onnx"
SITE = "decoder.layers.1.mlp.down"
JOINED = ("decoder.layers.1.mlp.gate", "decoder.layers.1.mlp.up")
"""Sites that are one product in a step."""

Plant = Callable[[onnx.ModelProto, str], None]


@pytest.fixture(scope="module")
def recipe(workshop: Path) -> Path:
    path = workshop / "quantized.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def made(recipe: Path, workshop: Path, cache: StageCache) -> Path:
    """The bundle: weights louder than any trained model's lose much, which is not the point."""
    return compile_recipe(load_recipe(recipe), workshop / "quantized", cache=cache)


@pytest.fixture(scope="module")
def provenance(made: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made / "manifest.json").read_text())["provenance"]
    return found


@pytest.fixture(scope="module")
def plan(recipe: Path, cache: StageCache) -> Plan:
    return Job(load_recipe(recipe), cache, Silent()).plan


@pytest.fixture(scope="module")
def planned(plan: Plan) -> VlmSpec:
    """The spec that the audits are held to."""
    return plan.spec


def sites_of(spec: VlmSpec, *roots: str) -> set[str]:
    """What is quantized under these roots, by the names that graphs give it."""
    found = {site for site in spec.schemes if site.startswith(roots)}
    return {site.replace("prefill.", "decoder.", 1) for site in found}


def test_it_answers_with_a_picture(made: Path) -> None:
    bundle = Bundle.open(made)
    session = Session(bundle)
    picture = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    answer = session.generate("What is this?", [picture], max_new_tokens=4, temperature=0.0)
    assert 1 <= len(answer.tokens) <= 4
    again = session.generate("What is this?", [picture], max_new_tokens=4, temperature=0.0)
    assert again.tokens == answer.tokens


def test_cache_and_table_are_of_eight_bits(made: Path) -> None:
    variant = Bundle.open(made).manifest.variants["ort"]
    (state,) = variant.state
    assert {tensor.dtype for tensor in state.tensors} == {"int8"}
    # Two layers of keys and values, two heads of 16, 256 slots.
    assert state.nbytes == 4 * 2 * 256 * 16
    table = next(graph for graph in variant.graphs if graph.role == "embedding")
    assert table.engine.options == {"bits": "8", "block_size": "32"}
    steps = {graph.name: graph for graph in variant.graphs if graph.role == "step"}
    assert {name: graph.phases for name, graph in steps.items()} == {
        "prefill": ("prefill",),
        "step": ("decode", "verify"),
    }
    shared = ("weights.bin", "embedding.npy", "embedding.scales.npy")
    assert {graph.weights for graph in steps.values()} == {shared}


def test_memory_is_that_of_the_plan(made: Path, plan: Plan) -> None:
    """The cache to the byte; of the weights what lies in their file, and what is in the graphs."""
    (variant,) = plan.variants
    (state,) = Bundle.open(made).manifest.variants["ort"].state
    assert variant.memory.state == state.nbytes
    held: dict[object, int] = {}
    for path in made.glob("*.onnx"):
        for name, value in ir.load(path).graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if not isinstance(tensor, ir.ExternalTensor):
                held[path.name, name] = tensor.nbytes
            elif tensor.location == "weights.bin":
                held[tensor.offset] = tensor.nbytes
    # Besides, graphs have constants of a few bytes.
    assert sum(held.values()) == pytest.approx(variant.memory.weights, rel=0.03)
    tables = [(made / name).stat().st_size for name in ("embedding.npy", "embedding.scales.npy")]
    assert 0 < sum(tables) - variant.memory.embedding < 2 * 256


def test_what_was_done_is_written_down(provenance: dict[str, Any], planned: VlmSpec) -> None:
    fold, quantize = provenance["changes"]
    assert (fold["pass"], quantize["pass"]) == ("fold_norms", "quantize")
    assert set(quantize["schemes"]) == set(planned.schemes)
    assert quantize["skipped"]["vision.layers.0.mlp.down"] == "a test"
    assert quantize["measures"]["samples"] == 2
    assert quantize["measures"]["mib_quantized"] < 0.5 * quantize["measures"]["mib_float32"]
    told = {item["asked"]: item["outcome"] for item in provenance["decisions"]}
    assert told["quantize prefill w8a8"] == "degraded"
    assert told["quantize decoder w4a16"] == told["kv int8 per channel"] == "applied"


def test_all_is_as_asked(provenance: dict[str, Any], planned: VlmSpec) -> None:
    """Every quantized site of every graph has a product that was judged, and none differs."""
    audits = {data["graph"]: GraphAudit.from_json(data) for data in provenance["audit"]["ort"]}
    caches = {f"decoder.layers.{index}.attention.core" for index in range(2)}
    expected = {
        "embedding": {"embedding"},
        "vision": sites_of(planned, "vision.", "projector."),
        "prefill": sites_of(planned, "prefill.", "decoder.head") | caches,
        "step": sites_of(planned, "decoder.") | caches,
    }
    assert set(audits) == set(expected)
    for name, audit in audits.items():
        assert audit.differences == ()
        assert audit.refused == ""
        judged = {row.site or row.name: row.outcome for row in audit.rows if row.asked is not None}
        assert set(judged) == expected[name], name
        assert set(judged.values()) == {AS_ASKED}
    products = {row.site: row.kernel for row in audits["prefill"].rows if row.asked is not None}
    assert products["decoder.layers.0.mlp.up"].startswith("MatMulIntegerToFloat")
    products = {row.site: row.kernel for row in audits["step"].rows if row.asked is not None}
    assert products["decoder.layers.0.mlp.up"].startswith("MatMulNBits")


def test_the_ladder_has_a_rung_for_what_was_lost(provenance: dict[str, Any]) -> None:
    rungs = provenance["evidence"]["rungs"]
    assert [(rung["name"], rung["parent"], rung["kind"]) for rung in rungs] == [
        ("hf", None, "reference"),
        ("ours", "hf", "model"),
        ("quantize", "ours", "quantized"),
        ("ort", "quantize", "graph"),
        ("ort/runtime", "ort", "runtime"),
    ]
    for rung in rungs[1:]:
        assert all(gate["passed"] for gate in rung["gates"])
    _, ours, lossy, graph, _ = rungs
    assert ours["decoder"]["relative_error"] < 1e-4
    assert 20 < lossy["vision"]["sqnr_db"] < 45
    assert lossy["decoder"]["kl"] > 1e-3
    # Graphs give the quantized model's numbers, up to numbers that round to the other side.
    assert graph["decoder"]["kl"] < 0.01 * lossy["decoder"]["kl"]
    assert graph["vision"]["sqnr_db"] > lossy["vision"]["sqnr_db"] + 6


def test_every_site_has_its_noise_and_its_harm(
    provenance: dict[str, Any], planned: VlmSpec
) -> None:
    sites = provenance["evidence"]["sites"]
    assert [row["site"] for row in sites["noise"]] == list(planned.schemes)
    for row in sites["noise"]:
        assert row["scheme"] == str(planned.schemes[row["site"]])
        bits = planned.schemes[row["site"]].weights.bits
        assert (15 if bits == 4 else 25) < row["own_db"] < (30 if bits == 4 else 60)
    harms = sites["harm"]
    assert {row["site"] for row in harms} == set(planned.schemes)
    assert [row["kl"] for row in harms] == sorted((row["kl"] for row in harms), reverse=True)
    steps = sites["what_if"]
    assert [step["sites"] for step in steps] == [
        [row["site"] for row in harms[:count]] for count in (0, 1, 4, 16)
    ]
    assert steps[-1]["kl"] < steps[0]["kl"]
    assert [step["extra_bytes"] for step in steps] == [
        sum(row["extra_bytes"] for row in harms[: len(step["sites"])]) for step in steps
    ]


def test_a_second_compile_reuses_every_stage(
    made: Path, recipe: Path, workshop: Path, cache: StageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was made again")

    monkeypatch.setattr("edgevlm.compile.load", refuse)
    monkeypatch.setattr("edgevlm.compile.audit_of", refuse)
    again = compile_recipe(load_recipe(recipe), workshop / "quantized-again", cache=cache)
    assert {path.name for path in again.iterdir()} == {path.name for path in made.iterdir()}
    for path in made.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def product_of(model: onnx.ModelProto, site: str) -> onnx.NodeProto:
    return next(
        node
        for node in model.graph.node
        if node.name.split("/")[0] == site and node.op_type == "MatMulNBits"
    )


def plant_level(model: onnx.ModelProto, site: str) -> None:
    """The kernel that rounds activations to int8, in silence."""
    for attribute in product_of(model, site).attribute:
        if attribute.name == "accuracy_level":
            attribute.i = 4


def plant_floats(model: onnx.ModelProto, site: str) -> None:
    """A product that stayed in float."""
    node = product_of(model, site)
    sizes = {given.name: given.i for given in node.attribute}
    weight = np.full((sizes["K"], sizes["N"]), 0.01, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "planted"))
    plain = helper.make_node("MatMul", [node.input[0], "planted"], list(node.output), node.name)
    node.CopyFrom(plain)


@pytest.mark.parametrize("sites", [(SITE,), JOINED], ids=["one product", "a joined one"])
@pytest.mark.parametrize(
    ("plant", "outcome", "cause"),
    [
        (
            plant_level,
            COARSER,
            "MatMulNBits 4-bit block 32 level 4 multiplies int8, asked float32",
        ),
        (plant_floats, NOT_REALISED, "weights are float32, asked int4: so the file has them"),
    ],
)
def test_a_lie_planted_in_the_written_file_is_found(
    made: Path,
    planned: VlmSpec,
    tmp_path: Path,
    sites: tuple[str, ...],
    plant: Plant,
    outcome: str,
    cause: str,
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(made, folder)
    edit(folder / STEP, plant, sites[0])
    variant: Variant = Bundle.open(made).manifest.variants["ort"]
    graph = next(graph for graph in variant.graphs if graph.file == STEP)
    audit = audit_of(planned, variant, graph, folder)
    assert [(row.site, row.outcome, row.cause) for row in audit.differences] == [
        (site, outcome, cause) for site in sites
    ]
    assert audit_of(planned, variant, graph, made).differences == ()


def test_what_is_strict_fails_on_a_graph_altered_in_the_cache(
    made: Path, recipe: Path, cache: StageCache, tmp_path: Path
) -> None:
    """Its numbers are within all gates: only the audit can tell."""
    copy = StageCache(root=tmp_path / "cache")
    shutil.copytree(cache.root, copy.root)
    (graphs,) = (path.parent for path in copy.root.glob(f"graphs/*/{STEP}") if has_prefill(path))
    edit(graphs / STEP, plant_level, SITE)
    out = tmp_path / "bundle"
    with pytest.raises(EvidenceError) as caught:
        compile_recipe(load_recipe(recipe), out, cache=copy)
    assert caught.value.rung == "audit"
    assert caught.value.site == SITE
    assert str(caught.value) == (
        f"graph 'step': '{SITE}' is coarser: MatMulNBits 4-bit block 32 level 4 multiplies int8, "
        "asked float32\n  hint: ask for what the engine does, or leave out `strict: true`"
    )
    assert not out.exists()


def has_prefill(step: Path) -> bool:
    return (step.parent / "ort.prefill.onnx").exists()


def edit(path: Path, plant: Plant, site: str) -> None:
    """Alter a graph whose weights lie in other files."""
    model = onnx.load(path, load_external_data=False)
    plant(model, site)
    path.write_bytes(model.SerializeToString())
    assert file_entries(path.parent)
