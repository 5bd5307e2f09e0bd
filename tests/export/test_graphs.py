"""Whole graphs of small models: captured, lowered, written, and run by ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from edgevlm.model.graphs import ModelGraph, delta_step, inplace_step, vision_graph
from edgevlm.model.spec import VlmSpec
from edgevlm.model.stages import Seen
from edgevlm.model.vlm import Vlm
from edgevlm_export.capture import capture
from edgevlm_export.lower import lower
from edgevlm_export.taps import tapped_sites, with_outputs
from edgevlm_export.targets import TARGETS
from edgevlm_export.write import WeightFile, write
from tests.edgevlm.tiny import drawn, native_spec, tiny_spec

CAPACITY = 16
# Logits and features of size 3 after two layers each, in float32.
TOLERANCE = 2e-5


def biased(spec: VlmSpec) -> VlmSpec:
    """The same with biases on queries, keys and values, as Qwen2 has them."""
    layers = tuple(
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, qkv_bias=True))
        for layer in spec.decoder.layers
    )
    return dataclasses.replace(spec, decoder=dataclasses.replace(spec.decoder, layers=layers))


SPECS = {
    "tied": tiny_spec(),
    "head norms": tiny_spec(tied=False, head_norms=True),
    "native resolution": biased(native_spec((4, 6))),
}
GRAPHS = {
    "tied": ("ort vision", "ort step", "static vision", "static step_1", "static step_8"),
    "head norms": ("ort step", "static step_8"),
    "native resolution": ("ort vision", "ort step", "static vision"),
}
CASES = [(model, graph) for model, graphs in GRAPHS.items() for graph in graphs]


@cache
def model_of(name: str) -> Vlm:
    return drawn(SPECS[name])


def made_graph(name: str, graph: str) -> ModelGraph:
    model = model_of(name)
    target, _, role = graph.partition(" ")
    if role == "vision":
        return vision_graph(model, num_images=1 if target == "static" else None)
    if role == "step":
        return inplace_step(model, CAPACITY)
    return delta_step(model, CAPACITY, int(role.removeprefix("step_")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All graphs of all models, written."""
    root = tmp_path_factory.mktemp("graphs")
    for name in SPECS:
        (root / name).mkdir()
        with WeightFile(root / name / "weights.bin") as weights:
            table = model_of(name).embedding.weight.detach().numpy()
            weights.write_table(table, root / name / "embedding.npy")
            for graph in GRAPHS[name]:
                made = made_graph(name, graph)
                target = TARGETS[graph.partition(" ")[0]]
                lowered = lower(capture(made.module, made.plan), target)
                write(lowered, root / name / f"{graph}.onnx", weights)
    return root


def session(path: Path, target: str, **options: Any) -> ort.InferenceSession:
    """A session with the options that the target asks for."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 1
    for name, value in TARGETS[target].engine.options.items():
        settings.add_session_config_entry(name, value)
    for name, value in options.items():
        setattr(settings, name, value)
    return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def feeds_of(made: ModelGraph) -> dict[str, np.ndarray]:
    pairs = zip(made.plan.inputs, made.examples, strict=True)
    return {spec.name: example.numpy() for spec, example in pairs}


@pytest.mark.parametrize(("name", "graph"), CASES)
def test_a_graph_equals_its_module(folder: Path, name: str, graph: str) -> None:
    made = made_graph(name, graph)
    with torch.inference_mode():
        expected = made.module(*made.examples)
    expected = expected if isinstance(expected, tuple) else (expected,)
    outputs = session(folder / name / f"{graph}.onnx", graph.split()[0]).run(None, feeds_of(made))
    assert float(expected[0].std()) > 0.5
    for out, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(out, wanted.numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "graph"), CASES)
def test_every_site_can_be_tapped(folder: Path, tmp_path: Path, name: str, graph: str) -> None:
    made, path = made_graph(name, graph), folder / name / f"{graph}.onnx"
    modules = {site: m for site, m in made.module.named_modules() if site}
    sites = tapped_sites(ir.load(path))
    ran: dict[str, np.ndarray] = {}
    for site, module in modules.items():

        def keep(_module: object, _inputs: object, output: Any, site: str = site) -> None:
            first = output[0] if isinstance(output, tuple) else output
            # What an encoder saw has its features, and what stages ask of them.
            ran[site] = (first.tokens.features if isinstance(first, Seen) else first).numpy()

        module.register_forward_hook(keep)
    with torch.inference_mode():
        made.module(*made.examples)
    for module in modules.values():
        module._forward_hooks.clear()
    # The features are those of layer 0, so a graph has no layer 1.
    leaves = {site for site in ran if not list(modules[site].children())}
    assert {site for site in leaves if not site.startswith("vision.layers.1")} <= set(sites)

    with TemporaryDirectory(dir=path.parent) as beside:
        copy = Path(beside) / path.name
        with_outputs(path, sites, copy)
        tapped = session(copy, graph.split()[0])
    names = [output.name for output in tapped.get_outputs()]
    values = dict(zip(names, tapped.run(None, feeds_of(made)), strict=True))
    for site in sites:
        np.testing.assert_allclose(values[site], ran[site], atol=TOLERANCE, rtol=0, err_msg=site)


@pytest.mark.parametrize(("name", "graph"), CASES)
def test_names_survive_in_the_profile(folder: Path, tmp_path: Path, name: str, graph: str) -> None:
    made, path = made_graph(name, graph), folder / name / f"{graph}.onnx"
    profiled = session(
        path, graph.split()[0], enable_profiling=True, profile_file_prefix=str(tmp_path / "p")
    )
    profiled.run(None, feeds_of(made))
    events = json.loads(Path(profiled.end_profiling()).read_text())
    kernels = [e for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    roots = {site for site, _ in made.module.named_modules() if site} | {"plumbing"}
    ran = Counter(e["name"].removesuffix("_kernel_time").partition("/")[0] for e in kernels)
    assert set(ran) <= roots
    known = {str(node.name).partition("/")[0] for node in ir.load(path).graph}
    # All but plumbing that ONNX Runtime folds away.
    assert known - {"plumbing"} <= set(ran)


@pytest.mark.parametrize(
    ("name", "count"), [("tied", 10), ("native resolution", 11)], ids=["Llama", "Qwen2"]
)
def test_nodes_of_a_decoder_layer(folder: Path, tmp_path: Path, name: str, count: int) -> None:
    path = folder / name / "ort step.onnx"
    optimized = tmp_path / "optimized.onnx"
    session(path, "ort", optimized_model_filepath=str(optimized))
    ours = [str(node.name) for node in ir.load(path).graph]
    theirs = [node.name for node in onnx.load(optimized, load_external_data=False).graph.node]
    for names in (ours, theirs):
        # Layer 0 has no add of its own: the norm of layer 1 takes it.
        assert sum(n.startswith("decoder.layers.0") for n in names) == count


def test_nodes_of_a_vision_layer(folder: Path) -> None:
    """Nothing is left that a faster fused op has room for."""
    model = ir.load(folder / "tied" / "ort vision.onnx")
    ops = Counter(n.op_type for n in model.graph if str(n.name).startswith("vision.layers.0"))
    assert ops == {
        "MatMul": 6,
        "LayerNormalization": 2,
        "MultiHeadAttention": 1,
        "QuickGelu": 1,
        # The bias of an activation without a fused form, and both residuals with the bias before.
        "Add": 5,
    }


def test_ort_step_in_chunks_through_one_buffer(folder: Path) -> None:
    """Present bound to past: three calls extend one cache, as decoding does."""
    model = model_of("tied")
    rows = model.embedding(torch.arange(12)[None] * 7 % 90)
    positions = torch.arange(12) + 2 * (torch.arange(12) > 4)
    with torch.inference_mode():
        expected = model(rows, positions).numpy()
    angles = positions[:, None] * torch.tensor(model.spec.decoder.rope.inv_freq)
    running = session(folder / "tied" / "ort step.onnx", "ort")
    past = {
        i.name: ort.OrtValue.ortvalue_from_numpy(np.full(i.shape, np.nan, np.float32))
        for i in running.get_inputs()
        if i.name.startswith("past")
    }
    for start, end in ((0, 7), (7, 8), (8, 12)):
        binding = running.io_binding()
        tables = np.zeros((2, CAPACITY, 8), np.float32)
        tables[:, : end - start] = angles[start:end].cos(), angles[start:end].sin()
        binding.bind_cpu_input("inputs_embeds", rows[:, start:end].detach().numpy())
        binding.bind_cpu_input("rope_cos", tables[0])
        binding.bind_cpu_input("rope_sin", tables[1])
        binding.bind_cpu_input("seqlens_k", np.array([end - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(end, np.int32))
        binding.bind_output("logits")
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        running.run_with_iobinding(binding)
        # logit_rows is not bound: the last row.
        logits = binding.get_outputs()[0].numpy()
        np.testing.assert_allclose(logits[:, 0], expected[:, end - 1], atol=TOLERANCE, rtol=0)


def test_static_chunks_with_padding_equal_the_whole(folder: Path) -> None:
    """Ten rows as 8 (full), then 2 in a graph of 8: six rows of padding, closed by the mask."""
    model = model_of("tied")
    rows = model.embedding(torch.arange(10)[None] * 7 % 90).detach()
    positions = torch.arange(10)
    with torch.inference_mode():
        expected = model(rows, positions).numpy()
    angles = positions[:, None] * torch.tensor(model.spec.decoder.rope.inv_freq)
    running = session(folder / "tied" / "static step_8.onnx", "static")
    names = [i.name for i in running.get_inputs() if i.name.startswith("past")]
    past = {name: np.full((1, 2, CAPACITY, 16), 1e4, np.float32) for name in names}
    for start, end in ((0, 8), (8, 10)):
        count = end - start
        mask = np.full((1, 1, 8, CAPACITY + 8), -60000.0, np.float32)
        mask[..., :count, :start] = 0
        mask[..., :count, CAPACITY : CAPACITY + count] = np.triu(
            np.full((count, count), -60000.0), 1
        )
        padded = {"inputs_embeds": np.zeros((1, 8, 64), np.float32)}
        padded["inputs_embeds"][:, :count] = rows[:, start:end]
        for name, table in (("rope_cos", angles.cos()), ("rope_sin", angles.sin())):
            padded[name] = np.zeros((8, 8), np.float32)
            padded[name][:count] = table[start:end]
        feeds = {**padded, "attn_mask": mask, "logit_rows": np.arange(8), **past}
        outputs = dict(
            zip([o.name for o in running.get_outputs()], running.run(None, feeds), strict=True)
        )
        logits = outputs["logits"][:, :count]
        np.testing.assert_allclose(logits, expected[:, start:end], atol=TOLERANCE, rtol=0)
        for name in names:
            new = outputs[name.replace("past", "new")]
            past[name][:, :, start:end] = new[:, :, :count]


@pytest.mark.parametrize("name", ["tied", "head norms"])
def test_static_graphs_share_all_weights_with_ort(folder: Path, name: str) -> None:
    """Both targets, and every row count, read the same bytes; a tied head's are the embedding's."""

    def places(graph: str) -> set[tuple[str, int, int]]:
        constants = ir.load(folder / name / f"{graph}.onnx").graph.initializers.values()
        tensors = [value.const_value for value in constants]
        external = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
        return {(str(t.location), t.offset or 0, t.length or 0) for t in external}

    used = {graph: places(graph) for graph in GRAPHS[name] if "step" in graph}
    assert all(found == used["ort step"] for found in used.values())
    tables = {place for place in used["ort step"] if place[0] == "embedding.npy"}
    assert len(tables) == (1 if SPECS[name].decoder.tied else 0)


def test_two_captures_are_equal_to_the_byte(tmp_path: Path) -> None:
    for number in ("one", "two"):
        made = inplace_step(drawn(SPECS["tied"]), CAPACITY)
        (tmp_path / number).mkdir()
        with WeightFile(tmp_path / number / "weights.bin") as weights:
            lowered = lower(capture(made.module, made.plan), TARGETS["ort"])
            write(lowered, tmp_path / number / "step.onnx", weights)
    for file in ("step.onnx", "weights.bin"):
        one, two = ((tmp_path / number / file).read_bytes() for number in ("one", "two"))
        assert one == two


@pytest.mark.parametrize(("name", "graph"), [c for c in CASES if c[1].startswith("static")])
def test_static_graphs_are_standard_onnx(folder: Path, name: str, graph: str) -> None:
    path = folder / name / f"{graph}.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 19)]
    for value in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
        assert all(size.HasField("dim_value") for size in value.type.tensor_type.shape.dim)
