"""Plans: counted by hand, and held against the module that torch builds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from edgevlm.decisions import Decision, refuse
from edgevlm.device import Device, load_device, parse_device
from edgevlm.errors import DeviceError, RecipeError
from edgevlm.model.spec import VlmSpec
from edgevlm.plan import Plan, make_plan, recipe_device
from edgevlm.recipe import parse_recipe
from edgevlm.resources import device_files
from edgevlm.sizes import parameters
from edgevlm.tokens import largest_picture
from edgevlm_runtime.images.spec import ImageSpec, TiledGeometry
from tests.edgevlm.tiny import drawn, native_spec, tiny_spec

MINIMAL = "model: owner/name\ndevice: host-cpu\n"


def planned(extra: str = "", spec: VlmSpec | None = None, device: Device | None = None) -> Plan:
    recipe = parse_recipe(MINIMAL + extra)
    return make_plan(recipe, device or load_device("host-cpu"), spec or tiny_spec())


def decision(plan: Plan, asked: str) -> Decision:
    (found,) = [decision for decision in plan.decisions if decision.asked == asked]
    return found


@pytest.mark.parametrize(
    "spec",
    [
        tiny_spec(),
        tiny_spec(tied=False, vision_bias=False, head_norms=True),
        native_spec((4, 6), (8, 4)),
    ],
    ids=["tied", "untied", "native"],
)
def test_parameters_are_those_of_the_module(spec: VlmSpec) -> None:
    model = drawn(spec)
    counted = {
        "vision": model.vision,
        "projector": model.projector,
        "embedding": model.embedding,
        "layers": model.decoder.layers,
        "norm": model.decoder.norm,
    }
    numbers = {
        name: sum(weight.numel() for weight in module.parameters())
        for name, module in counted.items()
    }
    count = parameters(spec)
    assert count.vision == numbers["vision"]
    assert count.projector == numbers["projector"]
    assert count.embedding == numbers["embedding"]
    assert count.layers == numbers["layers"] + numbers["norm"]
    assert count.total == sum(weight.numel() for weight in model.parameters())


def test_minimal_recipe() -> None:
    plan = planned()
    assert [variant.target for variant in plan.variants] == ["ort", "static"]
    assert plan.dtype == "float32"
    # 2 pictures of 16 rows, 512 rows of text, 16 of answer: 560, up to 640, at most 256 positions.
    assert plan.tokens.capacity == 256
    assert plan.tokens.per_call == {(4, 4): 16}
    assert plan.tokens.largest_picture == 16
    assert plan.tokens.prompt == 256 - 16 - 16
    refuse(plan.decisions)


def test_graphs_of_both_forms() -> None:
    ort, static = planned("context: {capacity: 160}\n").variants
    assert [graph.name for graph in ort.graphs] == ["vision", "step"]
    assert [graph.name for graph in static.graphs] == [
        "vision",
        "step_1",
        "step_8",
        "step_32",
        "step_128",
    ]
    step = ort.graphs[1]
    assert (step.form, step.rows, step.max_rows, step.mask) == ("inplace", None, 160, "causal")
    assert step.phases == ("prefill", "decode", "verify")
    assert [graph.phases for graph in static.graphs[1:]] == [
        ("decode", "verify"),
        ("decode", "verify"),
        ("prefill",),
        ("prefill",),
    ]
    shapes = {tensor.name: tensor.shape for tensor in static.graphs[4].signature.inputs}
    assert shapes["inputs_embeds"] == (1, 128, 64)
    assert shapes["attn_mask"] == (1, 1, 128, 160 + 128)
    assert shapes["past_key.1"] == (1, 2, 160, 16)
    assert static.graphs[0].signature.inputs[0].shape == (1, 3, 32, 32)
    assert isinstance(ort.graphs[0].signature.inputs[0].shape[0], str)


def test_no_dimension_of_a_static_variant_is_open() -> None:
    (static,) = planned("targets: [static]\n").variants
    for graph in static.graphs:
        for tensor in (*graph.signature.inputs, *graph.signature.outputs):
            assert all(isinstance(size, int) for size in tensor.shape), tensor


def test_a_long_prompt_is_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two chunks a generation can be cancelled; the tiny model has but 256 positions."""
    monkeypatch.setattr("edgevlm.plan.PREFILL_ROWS", 100)
    (ort,) = planned("context: {capacity: 160}\ntargets: [ort]\n").variants
    assert ort.graphs[1].max_rows == 100


def test_memory_is_counted() -> None:
    spec = tiny_spec()
    ort, static = planned("context: {capacity: 160}\n", spec).variants
    count = parameters(spec)
    encoder = 4 * (count.vision + count.projector)
    head = 4 * count.embedding  # tied: in the table, and packed in every step graph
    state = 2 * 2 * (2 * 160 * 16) * 4  # layers, key and value, heads x slots x width, float32
    layers = 4 * count.layers
    assert ort.memory.weights == static.memory.weights == encoder + layers
    assert ort.memory.packed == encoder + layers + head
    assert static.memory.packed == encoder + 4 * (layers + head)
    assert ort.memory.state == static.memory.state == state
    assert ort.memory.embedding == 4 * 96 * 64
    # The widest moment is attention of 160 rows: the residual twice, q, out, k, v, and scores.
    rows, seen = 160, 320
    assert ort.memory.activations == 4 * (
        2 * rows * 64 + rows * (64 + 64 + 32 + 32) + 4 * rows * seen
    )


def test_every_grid_has_its_graph() -> None:
    plan = planned(spec=native_spec((4, 6), (8, 4)))
    names = [graph.name for graph in plan.variants[0].graphs if graph.role == "vision"]
    assert names == ["vision_4x6", "vision_8x4"]
    assert plan.tokens.per_call == {(4, 6): 6, (8, 4): 8}
    assert plan.tokens.largest_picture == 8


def test_a_tiled_picture_counts_all_its_tiles() -> None:
    geometry = TiledGeometry(longest_edge=96, tile=32)
    image = ImageSpec.from_json(tiny_spec().image)
    spec = dataclasses.replace(
        tiny_spec(), image=dataclasses.replace(image, geometry=geometry).to_json()
    )
    # 9 tiles and the whole picture, 16 tokens and two marks each, a break per row and at the end.
    assert largest_picture(spec) == 10 * (16 + 2) + 3 + 2


def test_decisions_say_what_became_of_each_wish() -> None:
    plan = planned("passes: [fold_norms: {}]\ntargets: [ort]\ndtype: float32\n")
    assert decision(plan, "pass fold_norms") == Decision(
        asked="pass fold_norms",
        outcome="applied",
        reason="named in the recipe",
        effect="weights change, shapes and outputs do not",
    )
    assert decision(plan, "target 'ort'").outcome == "applied"
    assert decision(plan, "dtype 'float32'").reason == "host-cpu computes in it"
    assert decision(plan, "memory of variant 'ort'").outcome == "applied"
    assert {item.outcome for item in plan.decisions} == {"applied"}


def test_a_dtype_the_device_lacks_is_refused() -> None:
    plan = planned("dtype: float16\n")
    assert [(item.reason, item.effect) for item in plan.decisions if item.outcome == "refused"] == [
        (
            f"host-cpu computes in float32 on target {target!r}",
            "set dtype to float32, or leave it out",
        )
        for target in ("ort", "static")
    ]
    with pytest.raises(DeviceError) as caught:
        refuse(plan.decisions)
    assert str(caught.value) == (
        "dtype 'float16' is refused: host-cpu computes in float32 on target 'ort' (and 1 more)\n"
        "  hint: set dtype to float32, or leave it out"
    )
    assert caught.value.exit_code == 3


def edited_device(old: str, new: str) -> Device:
    path = device_files()["host-cpu"]
    text = path.read_text()
    assert text.count(old) == 1
    return parse_device(text.replace(old, new), path)


@pytest.mark.parametrize(
    ("recipe", "device", "expected"),
    [
        (
            "targets: [static]\n",
            ("targets: [ort, static]\n\n", "targets: [ort]\n\n"),
            "target 'static' is refused: host-cpu runs ort\n"
            "  hint: choose one of these, or another device",
        ),
        (
            "targets: [ort]\n",
            ("opset_max: {value: 26", "opset_max: {value: 20"),
            "target 'ort' is refused: it needs opset 21, host-cpu loads opset 20 at most\n"
            "  hint: choose another target or device",
        ),
        (
            "targets: [ort]\n",
            ("static_only: false", "static_only: true"),
            "target 'ort' is refused: its graphs take any number of rows, host-cpu wants fixed "
            "shapes\n  hint: choose the target 'static', or another device",
        ),
        (
            "targets: [ort]\ncontext: {capacity: 160}\n",
            ("value: 24, unit: GiB", "value: 1, unit: MiB"),
            "memory of variant 'ort' is refused: it needs up to 2 MiB, host-cpu has 1 MiB\n"
            "  hint: lower context.capacity, or choose a smaller model",
        ),
        (
            "context: {capacity: 257}\n",
            ("name: host-cpu", "name: host-cpu"),
            "context.capacity 257 is refused: the model knows 256 positions\n"
            "  hint: set context.capacity to at most 256",
        ),
    ],
)
def test_what_a_device_lacks_is_refused(
    recipe: str, device: tuple[str, str], expected: str
) -> None:
    if device[0].startswith("targets"):
        text = device_files()["host-cpu"].read_text()
        text = text.replace("targets: [ort, static]", "targets: [ort]")
        text = text.replace("targets: [static]", "targets: [ort]")
        made = parse_device(text, device_files()["host-cpu"])
    else:
        made = edited_device(*device)
    plan = planned(recipe, device=made)
    with pytest.raises(DeviceError) as caught:
        refuse(plan.decisions)
    assert str(caught.value) == expected


def test_a_short_context_degrades_static_prefill() -> None:
    plan = planned("context: {capacity: 64}\ntargets: [static]\n")
    assert decision(plan, "step graphs of 1, 8, 32, 128 rows on 'static'") == Decision(
        asked="step graphs of 1, 8, 32, 128 rows on 'static'",
        outcome="degraded",
        reason="a context of 64 rows has no room for 128",
        effect="long prompts are read 32 rows at a time",
    )
    assert [graph.rows for graph in plan.variants[0].graphs[1:]] == [1, 8, 32]


def test_a_context_that_a_picture_fills() -> None:
    plan = planned("context: {capacity: 24}\n")
    assert decision(plan, "context.capacity 24") == Decision(
        asked="context.capacity 24",
        outcome="degraded",
        reason="one picture takes up to 16 rows of 24",
        effect="answers end before 16 tokens, where the context is full",
    )
    assert plan.tokens.prompt == 0
    with pytest.raises(DeviceError) as caught:
        refuse(planned("context: {capacity: 16}\n").decisions)
    assert str(caught.value) == (
        "context.capacity 16 is refused: one picture takes up to 16 rows of 16\n"
        "  hint: set context.capacity to more than 16"
    )


def test_notes_and_loosened_gates_are_told() -> None:
    spec = dataclasses.replace(tiny_spec(), notes=("repetition_penalty 1.1 is not done",))
    plan = planned("evidence: {gates: {kl: 0.1}, reason: a test}\n", spec)
    told = [(item.asked, item.reason) for item in plan.decisions if item.outcome == "degraded"]
    assert told == [
        ("checkpoint", "repetition_penalty 1.1 is not done"),
        ("evidence.gates.kl 0.1", "a test"),
    ]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            "targets: [ort, statc]\n",
            "recipe.yaml:3:16: unknown target 'statc'\n  hint: did you mean 'static'?",
        ),
        ("targets: [ort, ort]\n", "recipe.yaml:3:16: target 'ort' is named twice"),
    ],
)
def test_unknown_targets(extra: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(extra)
    assert str(caught.value) == expected


def test_unknown_device() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_device(parse_recipe("model: a/b\ndevice: host-gpu\n"))
    assert str(caught.value) == (
        "recipe.yaml:2:9: unknown device 'host-gpu'\n  hint: did you mean 'host-cpu'?"
    )


def test_signatures_fit_the_module() -> None:
    """A planned step graph runs with arrays of exactly the planned shapes."""
    import torch

    from edgevlm.model.graphs import delta_step

    spec = tiny_spec()
    (static,) = planned("targets: [static]\ncontext: {capacity: 32}\n", spec).variants
    graph = next(graph for graph in static.graphs if graph.rows == 8)
    made = delta_step(drawn(spec), 32, 8)
    feeds: list[Any] = []
    for tensor in graph.signature.inputs:
        shape = [int(size) for size in tensor.shape]
        feeds.append(torch.from_numpy(np.zeros(shape, tensor.dtype)))
    outputs = made.module(*feeds)
    for tensor, output in zip(graph.signature.outputs, outputs, strict=True):
        assert tuple(output.shape) == tensor.shape, tensor.name
