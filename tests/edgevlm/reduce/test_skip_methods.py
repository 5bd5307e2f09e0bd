"""What a model makes of methods whose tokens skip layers: numbers of tokens, and refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from edgevlm.device import load_device
from edgevlm.document import parse_text
from edgevlm.errors import PassError, RecipeError
from edgevlm.model.plans import delta_plan, step_states
from edgevlm.model.spec import VlmSpec
from edgevlm.passes.base import Context, Foresight
from edgevlm.passes.reduce import Reduce
from edgevlm.passes.rotate import Rotate
from edgevlm.reduce.options import StageOptions
from edgevlm.reduce.plan import average_tokens
from edgevlm.reduce.schedules.cosine import Cosine
from tests.edgevlm.reduce.deep import deep_spec, skipping, staged
from tests.edgevlm.reduce.test_deep_methods import llava

# LLaVA-1.5-7B: 32 layers, 576 tokens.


def foreseen(spec: VlmSpec, **options: Any) -> Foresight:
    """A reduction, as a recipe writes it."""
    context = Context(device=load_device("host-cpu"), targets=("ort",))
    return Reduce.model_validate(options).foresee(spec, context)


def runs(spec: VlmSpec) -> list[tuple[str, int, int, int]]:
    """State group, first layer, last layer and tokens of every segment."""
    return [(part.group, part.first, part.end - 1, part.tokens) for part in spec.segments]


def test_p_mod_as_published() -> None:
    """Layers 0 to 7 are dense; those at the floor share a state."""
    after = foreseen(llava(), method="p_mod")
    shares = [max(math.cos(math.pi * layer / 31) / 2 + 0.5, 0.15) for layer in range(8, 32)]
    assert runs(after.spec) == [
        ("main", 0, 7, 576),
        *(
            (f"from_{min(layer, 24)}", layer, layer, math.trunc(576 * share))
            for layer, share in enumerate(shares, 8)
        ),
    ]
    assert after.effect == "576 visual tokens become 309.2 on average"
    assert [(found.asked, found.outcome, found.effect) for found in after.decisions] == [
        (
            "stage 1, router+top+reweighted at decoder.layers.8 to 31",
            "applied",
            "86 to 486 of 576 tokens pass each of 24 layers, and the others skip it",
        ),
        (
            "stage 1, what router learned",
            "degraded",
            "it is as training begins with it; write weights: FILE.safetensors",
        ),
    ]


def test_videollm_mod_skips_every_second_layer() -> None:
    after = foreseen(llava(), method="videollm_mod")
    assert runs(after.spec) == [
        ("main", 0, 0, 576),
        *(
            ("from_1" if layer % 2 else "main", layer, layer, 115 if layer % 2 else 576)
            for layer in range(1, 32)
        ),
    ]
    assert after.decisions[0].effect == (
        "115 of 576 tokens pass each of 16 layers, and the others skip it"
    )


def test_layers_that_as_many_tokens_pass_share_a_state() -> None:
    spec = staged(deep_spec(8), skipping("gated", {"every": {"step": 3, "first": 2}}, keep=9))
    assert runs(spec) == [
        ("main", 0, 1, 36),
        ("from_2", 2, 2, 9),
        ("main", 3, 4, 36),
        ("from_2", 5, 5, 9),
        ("main", 6, 7, 36),
    ]


def test_state_has_a_group_for_every_number_of_rows() -> None:
    """Capacities differ by what skips, and every layer is in one group."""
    spec = staged(deep_spec(6), skipping("gated", {"every": {"step": 2}}, keep=9))
    for form in ("inplace", "delta"):
        groups = step_states(spec, 100, form)
        assert [(group.name, group.capacity) for group in groups] == [("main", 100), ("from_1", 73)]
        layers = [sorted({tensor.layer for tensor in group.tensors}) for group in groups]
        assert layers == [[0, 2, 4], [1, 3, 5]]
    # Graphs give the state back layer by layer.
    outputs = [tensor.name for tensor in delta_plan(spec, 100, 8).outputs]
    assert outputs[1:] == [f"new_{part}.{layer}" for layer in range(6) for part in ("key", "value")]


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.5375, 0.8, 0.98])
def test_a_budget_moves_the_wave(keep: float) -> None:
    """One shift for all layers, between the floor and what is dense."""
    spec = foreseen(llava(), method="p_mod", keep=keep).spec
    assert abs(average_tokens(spec.segments) - keep * 576) < 1
    counts = [part.tokens for part in spec.segments]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 86
    assert all(count <= 0.85 * 576 for count in counts[1:])


def test_a_budget_of_evenly_placed_layers() -> None:
    stage = skipping("gated", {"every": {"step": 1}}, keep="budget")
    spec = staged(llava(), stage, keep=0.5)
    assert abs(average_tokens(spec.segments) - 288) < 1
    assert [part.tokens for part in spec.segments[1:]] == [279] * 31


def test_a_stage_before_the_decoder_takes_some() -> None:
    """Shares are those of the tokens that come."""
    first = {"at": "projector", "keep": 16, "select": "uniform"}
    spec = staged(deep_spec(), first, skipping("gated", "every", keep=0.5))
    assert [part.tokens for part in spec.segments] == [16, 8, 16, 8]


@pytest.mark.parametrize(
    ("schedule", "count"), [(Cosine(), 24), (Cosine(shift=0.2), 31), (Cosine(shift=1.3), 5)]
)
def test_shares_along_half_a_wave(schedule: Cosine, count: int) -> None:
    """By hand: the share of each layer, and the dense ones left out."""
    shift = 0.5 if schedule.shift is None else schedule.shift
    want = {}
    for layer in range(1, 32):
        share = max(math.cos(math.pi * layer / 31) / 2 + shift, 0.15)
        if share <= 0.85:
            want[layer] = share
    assert schedule.shares(32, None) == pytest.approx(want, abs=1e-12)
    assert len(want) == count


def refused(spec: VlmSpec, *stages: dict[str, Any], keep: float | None = None) -> str:
    """What is said of stages that cannot be."""
    with pytest.raises(PassError) as error:
        staged(spec, *stages, keep=keep)
    return str(error.value)


CUT = {"at": "decoder", "layer": 1, "keep": 9, "score": "random", "select": "top"}


def test_no_cut_stands_beside_layers_that_are_skipped() -> None:
    p_mod = skipping("reweighted", "cosine")
    for stages, first, other in (
        ((CUT, p_mod), 2, 1),
        ((p_mod, CUT), 1, 2),
        ((p_mod, p_mod), 1, 2),
    ):
        assert refused(deep_spec(), *stages) == (
            f"reduce: stage {first}: tokens that skip layers come back behind each of them, and "
            f"stage {other} takes or skips tokens of the decoder too\n"
            "  hint: leave one of them out, or take tokens away at projector"
        )


@pytest.mark.parametrize(
    ("stage", "keep", "message"),
    [
        (
            skipping("gated", {"every": {"first": 4}}, keep=9),
            None,
            "reduce: stage 1: tokens skip layers from layer 4 on, of a decoder of 4\n"
            "  hint: choose first from 1 to 3",
        ),
        (
            skipping("gated", "every", keep=37),
            None,
            "reduce: stage 1: cannot keep 37 of the 36 tokens that come\n"
            "  hint: keep at most 36",
        ),
        (
            skipping("gated", "every", keep=0.01),
            None,
            "reduce: stage 1: none of the 36 tokens that come pass layer 1\n"
            "  hint: keep at least one",
        ),
        (
            skipping("reweighted", {"cosine": {"shift": 2.0}}),
            None,
            "reduce: stage 1: a shift of 2 leaves no layer of 4 that tokens skip\n"
            "  hint: lower shift, or raise ceiling",
        ),
        (
            skipping("reweighted", {"cosine": {"shift": 0.3}}),
            0.5,
            "reduce: keep is 0.5, and every stage says itself what it keeps\n"
            "  hint: remove keep, or write keep: budget in a stage",
        ),
        (
            skipping("reweighted", "cosine"),
            0.2,
            "reduce: an average of 7.2 of 36 tokens is out of reach: over 4 layers these stages "
            "leave at least 12.75, 35.4 %\n"
            "  hint: ask for 0.355 or more, or cut earlier",
        ),
        (
            skipping("reweighted", {"cosine": {"ceiling": 0.2}}),
            0.95,
            "reduce: an average of 34.2 of 36 tokens is out of reach: these stages leave at most "
            "28.75, 79.9 %\n"
            "  hint: ask for 0.798 or less",
        ),
        (
            skipping("gated", "every", keep=8, select={"top": {"lattice": 2}}),
            None,
            "reduce: stage 1: a lattice of every 2 of 6 x 6 tokens holds 9, and 8 are kept\n"
            "  hint: keep more tokens, or widen the lattice",
        ),
    ],
)  # fmt: skip
def test_what_a_model_has_no_place_for(
    stage: dict[str, Any], keep: float | None, message: str
) -> None:
    context = Context(device=load_device("host-cpu"), targets=("ort",))
    with pytest.raises(PassError) as error:
        Reduce.model_validate({"stages": (stage,), "keep": keep}).foresee(deep_spec(), context)
    assert str(error.value) == message


def test_only_layers_that_are_skipped_take_rows_one_by_one() -> None:
    """A mixer whose state is a sequence may stand between them."""
    spec = deep_spec()
    layers = list(spec.decoder.layers)
    layers[2] = dataclasses.replace(layers[2], mixer="short_conv")
    spec = dataclasses.replace(
        spec, decoder=dataclasses.replace(spec.decoder, layers=tuple(layers))
    )
    assert staged(spec, skipping("gated", "every", keep=9)).segments[1].tokens == 9
    assert refused(spec, skipping("gated", {"every": {"step": 1}}, keep=9)) == (
        "reduce: stage 1: decoder.layers.2 is 'short_conv', whose state stands for rows in their "
        "order\n"
        "  hint: put the stage at projector, before the decoder"
    )


START = "at: decoder\nscore: router\nselect: top\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            START + "keep: 9\nskip: gated\n",
            "stage.yaml:5:1: 'gated' lets tokens skip layers, and no schedule says which\n"
            "  hint: add schedule: {every: {step: 2}}, or schedule: cosine",
        ),
        (
            START + "keep: 9\nlayer: 2\nschedule: every\n",
            "stage.yaml:6:1: schedule is for tokens that skip layers, and here they are dropped\n"
            "  hint: add skip: reweighted, or write layer: 8",
        ),
        (
            START + "keep: 9\nlayer: 2\nschedule: every\nskip: gated\n",
            "stage.yaml:5:1: tokens skip the layers of a schedule, and layer is where they are "
            "dropped\n"
            "  hint: remove layer",
        ),
        (
            START + "keep: 9\nschedule: cosine\nskip: gated\n",
            "stage.yaml:4:1: 'cosine' says itself how many tokens pass a layer\n"
            "  hint: remove keep, or write schedule: {every: {step: 2}}",
        ),
        (
            START + "place: repack\nschedule: cosine\nskip: gated\n",
            "stage.yaml:4:1: tokens that skip a layer come back to their places behind it, and "
            "place is for those that are dropped\n"
            "  hint: remove place",
        ),
        (
            START + "rest: recycle\nschedule: cosine\nskip: gated\n",
            "stage.yaml:4:1: tokens that skip a layer come back to their places behind it, and "
            "rest is for those that are dropped\n"
            "  hint: remove rest",
        ),
        (
            "at: decoder\nscore: text_attention\nselect: top\nschedule: cosine\nskip: reweighted\n",
            "stage.yaml:2:1: 'reweighted' weighs tokens by the scores of a router, and got "
            "'text_attention'\n"
            "  hint: score by router",
        ),
        (
            "at: decoder\nselect: uniform\nschedule: cosine\nskip: reweighted\n",
            "stage.yaml:4:1: 'reweighted' weighs tokens by the scores of a router, and the stage "
            "has none\n"
            "  hint: score by router",
        ),
        (
            "at: decoder\nscore: router\nselect: pivots\nschedule: cosine\nskip: reweighted\n",
            "stage.yaml:3:1: 'pivots' looks at more than tokens and their scores, and other tokens "
            "pass each layer\n"
            "  hint: write select: top",
        ),
        (
            "at: projector\nselect: top\nscore: router\n",
            "stage.yaml:1:1: 'router' cannot stand at projector\n  hint: choose decoder",
        ),
        (
            "at: encoder\nmerge: bipartite\nskip: gated\n",
            "stage.yaml:3:1: skip goes with select\n  hint: remove skip",
        ),
        (
            START + "schedule: {cosine: {floor: 0.9}}\nskip: gated\n",
            "stage.yaml:4:21: a floor of 0.9 is above the ceiling of 0.85\n"
            "  hint: lower floor, or raise ceiling",
        ),
        (
            START + "schedule: cosin\nskip: gated\n",
            "stage.yaml:4:11: unknown schedule 'cosin'\n  hint: did you mean 'cosine'?",
        ),
    ],
)
def test_what_a_stage_cannot_say(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_text(text, Path("stage.yaml")).parse(StageOptions)
    assert str(error.value) == message


def test_rows_that_a_router_reads_are_not_rotated() -> None:
    spec = staged(deep_spec(), skipping("gated", "every", keep=9))
    context = Context(device=load_device("host-cpu"), targets=("ort",))
    with pytest.raises(PassError) as error:
        Rotate().foresee(spec, context)
    assert str(error.value) == (
        "rotate: 'router' of stage 1 has learned to read rows that are not rotated\n"
        "  hint: leave decoder out of components"
    )


def test_text_is_not_fused_where_tokens_skip() -> None:
    stage = skipping("gated", "every", keep=9)
    with pytest.raises(PassError) as error:
        foreseen(deep_spec(), stages=(stage,), fusion={"layers": 1})
    assert str(error.value) == (
        "reduce: fused text has seen all visual tokens, and a stage within the decoder asks what "
        "it looks at\n"
        "  hint: put the stages before the decoder"
    )


def test_a_budget_is_a_share_of_something() -> None:
    """A stage that takes any number of tokens has none of its own."""
    with pytest.raises(PassError) as error:
        foreseen(deep_spec(), stages=(skipping("gated", "every"),))
    assert str(error.value) == (
        "reduce: stages keep a budget, and none is given\n"
        "  hint: write keep: 0.25 beside the method"
    )
