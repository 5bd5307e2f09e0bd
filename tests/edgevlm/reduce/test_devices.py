"""Devices that lack an op of choosing: done in another way, or refused with what would work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from edgevlm.decisions import Decision, refuse
from edgevlm.device import Device, parse_device
from edgevlm.errors import DeviceError
from edgevlm.model.graphs import ModelGraph, delta_step, vision_graph
from edgevlm.model.spec import VlmSpec
from edgevlm.plan import Plan, make_plan
from edgevlm.recipe import parse_recipe
from edgevlm.reduce.piece import Choice, known
from edgevlm.reduce.plan import Reduction
from edgevlm.reduce.rests.anchors import Anchors
from edgevlm_export.capture import capture
from edgevlm_export.lower import lower
from edgevlm_export.targets import TARGETS
from tests.edgevlm.tiny import drawn, tiny_spec

# A board that exists nowhere: only what is said of `ops` matters here.
DEVICE = """name: tiny-npu
summary: a made-up processor
vendor: none
soc: none
stack: {name: none, version: "0"}
targets: [static]
compile:
  route: none
  static_only: true
  opset_max: {value: 19, kind: assumed, source: made-up}
memory:
  capacity: {value: 1, unit: GiB, kind: assumed, source: made-up}
dtypes:
  - {weight: float32, activation: float32, targets: [static], kind: assumed, source: made-up}
ops: OPS
numeric:
  mask_value: {value: -60000, kind: assumed, source: made-up}
  bfloat16: false
sources: {made-up: this test}
verified_on: "2026-11-21"
"""
HEAD = "model: owner/name\ndevice: tiny-npu\ncontext: {capacity: 160}\n"
TOP = "{at: projector, keep: 5, score: random, select: top}"
ZIP = "{at: encoder, keep: 6, score: encoder_attention, select: top, rest: {anchors: {share: 0.3}}}"
SPREAD = "{at: projector, keep: 5, select: spread}"
CUT = "{at: decoder, layer: 1, keep: 5, score: {text_attention: {layer: previous}}, select: top}"
SKIP = "{at: decoder, schedule: cosine, score: router, select: top, skip: reweighted}"
INSTEAD = "tokens are chosen by comparisons and one-hot products"


def device(**ops: str) -> Device:
    """The board, with what becomes of some ops in float32."""
    runs = ", ".join(f"{op}: {{float32: {where}}}" for op, where in ops.items())
    return parse_device(DEVICE.replace("OPS", f"{{{runs}}}"), Path("tiny-npu.yaml"))


def planned(stage: str, board: Device) -> Plan:
    recipe = parse_recipe(f"{HEAD}passes: [{{reduce: {{stages: [{stage}]}}}}]\n")
    return make_plan(recipe, board, tiny_spec())


def reduction(plan: Plan) -> Reduction:
    assert plan.spec.reduction is not None
    return plan.spec.reduction


def decisions(plan: Plan) -> list[Decision]:
    """What is done in another way, or not at all, but for what every recipe is told."""
    lossy = [found for found in plan.decisions if found.outcome != "applied"]
    return [found for found in lossy if not found.asked.startswith(("turns after", "step graphs"))]


@pytest.mark.parametrize(
    ("ops", "reason"),
    [
        ({"TopK": "fail"}, "no TopK on tiny-npu"),
        ({"Gather": "fail"}, "no Gather on tiny-npu"),
        ({"TopK": "fail", "Gather": "fail", "ArgMax": "fail"}, "no TopK and no Gather on tiny-npu"),
    ],
)
def test_without_sorting_or_look_ups(ops: dict[str, str], reason: str) -> None:
    plan = planned(TOP, device(**ops))
    assert decisions(plan) == [
        Decision(asked="choice of tokens", outcome="degraded", reason=reason, effect=INSTEAD)
    ]
    assert reduction(plan).dense
    assert all(stage.dense for stage in reduction(plan).of((4, 4), "projector"))
    refuse(plan.decisions)


@pytest.mark.parametrize(
    "ops", [{}, {"TopK": "cpu", "Gather": "npu"}, {"ArgMax": "fail"}, {"Softmax": "fail"}]
)
def test_where_nothing_is_lacking(ops: dict[str, str]) -> None:
    plan = planned(TOP, device(**ops))
    assert decisions(plan) == []
    assert not reduction(plan).dense


def test_types_of_the_device_count() -> None:
    """What fails in integers alone is there for scores, which are floats."""
    text = DEVICE.replace("OPS", "{TopK: {int8: fail, float32: npu}}")
    board = parse_device(text, Path("tiny-npu.yaml"))
    assert not board.lacks("TopK")
    assert not reduction(planned(TOP, board)).dense
    half = parse_device(DEVICE.replace("OPS", "{TopK: {float16: fail}}"), Path("tiny-npu.yaml"))
    assert half.lacks("TopK")


def test_a_constant_map_is_as_it_was() -> None:
    board = device(TopK="fail", Gather="fail", ArgMax="fail")
    assert decisions(planned("{at: encoder, keep: 4, transform: fourier}", board)) == []


@pytest.mark.parametrize(
    ("stage", "ops", "asked", "by", "effect"),
    [
        (SPREAD, ["ArgMax"], "spread at projector", "'spread' works by ArgMax", "CHOICES"),
        (SPREAD, ["TopK"], "spread at projector", "'spread' works by TopK", "CHOICES"),
        (
            "{at: projector, keep: 5, select: cover}",
            ["ArgMax", "Gather"],
            "cover at projector",
            "'cover' works by Gather and ArgMax",
            "CHOICES",
        ),
        (
            ZIP,
            ["ArgMax"],
            "encoder_attention+top+anchors at encoder",
            "'anchors' works by ArgMax",
            "leave rest out",
        ),
        (
            CUT,
            ["Gather"],
            "text_attention+top at decoder.layers.1",
            "rows are taken between layers by Gather",
            "put the stage at projector",
        ),
        (
            SKIP,
            ["Gather"],
            "router+top+reweighted at decoder.layers.1",
            "rows skip layers by Gather",
            "take tokens away at projector",
        ),
    ],
)
def test_what_has_no_other_form_is_refused(
    stage: str, ops: list[str], asked: str, by: str, effect: str
) -> None:
    plan = planned(stage, device(**dict.fromkeys(ops, "fail")))
    choices = [name for name, kind in known(Choice).items() if kind.static_class != "S2"]
    assert {"top", "uniform"} <= set(choices)
    if effect == "CHOICES":
        effect = f"choose {' or '.join(sorted(choices))}"
    with pytest.raises(DeviceError) as caught:
        refuse(plan.decisions)
    assert str(caught.value) == (
        f"stage 1, {asked} is refused: {by}, which tiny-npu does not run\n"
        f"  hint: {effect}, or choose another device"
    )
    assert caught.value.exit_code == 3
    outcomes = [found.outcome for found in plan.decisions if found.asked == f"stage 1, {asked}"]
    assert outcomes == ["refused"]
    assert not [found for found in decisions(plan) if found.asked == "choice of tokens"]


def op_types(graph: ModelGraph) -> dict[str, set[str]]:
    """Types of the ops of a lowered graph that stages made, by the first part of their sites."""
    lowered = lower(capture(graph.module, graph.plan), TARGETS["static"])
    found: dict[str, set[str]] = {"stages": set(), "all": set()}
    for node in lowered.graph:
        site = node.name or ""
        found["all"].add(node.op_type)
        if site.startswith(("vision.reduce.", "reduce.", "decoder.cuts.")):
            found["stages"].add(node.op_type)
    return found


LOOKS = {"TopK", "Gather", "GatherND", "GatherElements", "ArgMax"}


@pytest.mark.parametrize(
    ("stage", "left"),
    [
        (TOP, set()),
        ("{at: projector, keep: 5, select: uniform}", set()),
        (ZIP, set(Anchors.ops)),
        # Refused, for good reason.
        (SPREAD, {"TopK", "Gather", "ArgMax"}),
    ],
)
def test_ops_of_choosing_in_graphs(stage: str, left: set[str]) -> None:
    """A graph has those that its pieces say they cannot do without, and no other."""
    plan = planned(stage, device(TopK="fail", Gather="fail"))
    ops = op_types(vision_graph(drawn(plan.spec), None, 1))
    assert ops["all"] & LOOKS == left


def test_a_cut_without_sorting() -> None:
    """Rows still go by look-ups, as a head's do."""
    plan = planned(CUT, device(TopK="fail"))
    ops = op_types(delta_step(drawn(plan.spec), 160, 128, ("picture",), 1))
    assert ops["stages"] & LOOKS == {"Gather"}
    assert "TopK" not in ops["all"]


@pytest.mark.parametrize("stage", [TOP, ZIP], ids=["top", "anchors"])
def test_both_forms_choose_the_same(stage: str) -> None:
    dense = planned(stage, device(TopK="fail", Gather="fail")).spec
    usual = planned(stage, device()).spec
    assert dense.reduction != usual.reduction
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))

    def tokens(spec: VlmSpec) -> torch.Tensor:
        with torch.no_grad():
            return drawn(spec).encode(pixels)

    # In eager form both take rows by their numbers: not one bit differs.
    assert torch.equal(tokens(dense), tokens(usual))


def test_squares_of_patches_without_look_ups() -> None:
    """A projector that joins patches: scores of a square are the means of its patches."""
    spec = tiny_spec()
    projector = dataclasses.replace(
        spec.projector, kind="pixel_shuffle", merge=2, hidden_width=0, activation=""
    )
    spec = dataclasses.replace(spec, projector=projector)
    stage = "{at: projector, keep: 3, score: encoder_attention, select: top}"
    recipe = parse_recipe(f"{HEAD}passes: [{{reduce: {{stages: [{stage}]}}}}]\n")
    specs = [make_plan(recipe, board, spec).spec for board in (device(), device(Gather="fail"))]
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        usual, dense = (drawn(made).encode(pixels) for made in specs)
    assert torch.equal(usual, dense)
    ops = op_types(vision_graph(drawn(specs[1]), None, 1))
    assert ops["stages"] & LOOKS == set()
