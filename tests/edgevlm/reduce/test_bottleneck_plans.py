"""A bottleneck in plans: what it costs, what the context is charged, and where it has no place."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgevlm.commands.plan import show_plan
from edgevlm.document import Complaint, parse_text
from edgevlm.errors import RecipeError
from edgevlm.model.spec import VlmSpec
from edgevlm.passes.base import Context
from edgevlm.passes.reduce import Reduce
from edgevlm.plan import Plan, make_plan, recipe_device
from edgevlm.recipe import parse_recipe
from edgevlm.reduce.check import problems_of
from edgevlm.reduce.cost import Prompt, kept_rows, kv_numbers, prefill_macs, prompt_rows
from edgevlm.reduce.fusion import FusionOptions
from edgevlm.reduce.options import StageOptions
from edgevlm.reduce.positions import PositionOptions
from edgevlm.reduce.solve import Problem
from edgevlm.tokens import SegmentPlan, largest_picture
from tests.edgevlm.reduce.deep import GRID, TOKENS, deep_spec, staged
from tests.edgevlm.reduce.models import reduced
from tests.edgevlm.reduce.test_devices import device
from tests.edgevlm.tiny import native_spec

ROWS = {"at": "projector", "keep": 4, "bottleneck": "learned_rows"}
RECIPE = "model: a/b\ndevice: host-cpu\ntargets: [ort, static]\ncontext: {{text_rows: 10{}}}\n"
VOCO = "passes: [{reduce: {method: voco, keep: 4}}]\n"


def planned(passes: str = VOCO, context: str = ", capacity: 200") -> Plan:
    recipe = parse_recipe(RECIPE.format(context) + passes)
    return make_plan(recipe, recipe_device(recipe), deep_spec())


def test_the_picture_passes_whole_and_the_cache_keeps_its_rows() -> None:
    tokens = planned().tokens
    decoder = deep_spec().decoder
    assert dict(tokens.per_call) == {GRID: TOKENS + 4}
    assert tokens.layers == (TOKENS + 4,) * 4
    assert tokens.segments == (
        SegmentPlan(
            first=0,
            end=4,
            tokens=TOKENS + 4,
            kept=4,
            rows=TOKENS + 4 + 10,
            positions="kept",
            group="main",
            capacity=200,
        ),
    )
    rows = TOKENS + 4 + 10
    assert tokens.cost.prefill == prefill_macs(decoder, [rows] * 4)
    assert tokens.cost.choosing == rows * rows
    assert tokens.cost.kv_numbers == kv_numbers(decoder, [4 + 10] * 4) == 14 * 4 * 2 * 32
    assert tokens.cost.kv_bytes == 4 * tokens.cost.kv_numbers
    assert tokens.percent is not None
    assert tokens.percent["kv"] == 100 * 14 / (TOKENS + 10)
    assert tokens.percent["average_tokens"] == 100 * (TOKENS + 4) / TOKENS


def test_several_groups_each_keep_their_rows() -> None:
    spec, prompt = staged(deep_spec(), ROWS), Prompt(grid=GRID, text_rows=7, groups=3)
    assert prompt_rows(spec, prompt) == (3 * 40 + 7,) * 4
    assert kept_rows(spec, prompt) == (3 * 4 + 7,) * 4


def test_the_context_is_charged_for_the_rows() -> None:
    """All of the context but four rows of a picture and sixteen of an answer is for text."""
    plan, whole = planned(), planned("")
    assert largest_picture(plan.spec) == 4
    assert (plan.tokens.prompt, whole.tokens.prompt) == (200 - 4 - 16, 200 - TOKENS - 16)
    assert plan.spec.image["tokens"] == [TOKENS + 4]
    for variant in plan.variants:
        assert [(group.name, group.capacity) for group in variant.state] == [("main", 200)]
    # A context that a whole picture would not fit in.
    small = planned(context=", capacity: 32")
    assert [decision for decision in small.decisions if decision.outcome == "refused"] == []


def test_its_graphs() -> None:
    """Hidden rows take no slots, and have positions."""
    ort, static = planned().variants
    (picture,) = [graph for graph in ort.graphs if graph.phases == ("picture",)]
    assert (picture.dropped, picture.max_rows) == ({"main": TOKENS}, 200 + 2 * TOKENS)
    shapes = {tensor.source: tensor.shape for tensor in picture.signature.inputs}
    assert shapes["rope_cos"] == (200 + 2 * TOKENS, 8)
    assert shapes["state:key.0"] == (1, 2, 200, 16)
    assert "last_row" not in shapes
    one, two = [graph for graph in static.graphs if graph.phases == ("picture",)]
    assert (one.name, two.name) == ("picture_1_160", "picture_2_192")
    assert two.dropped == {"main": TOKENS}
    shapes = {tensor.source: tensor.shape for tensor in two.signature.inputs}
    rows = 192 - 2 * TOKENS
    assert shapes["mask:main"] == (1, 1, rows, 200 + rows)
    assert shapes["rope_cos"] == (192, 8)


def test_its_decisions() -> None:
    plan = planned()
    found = [
        (decision.asked, decision.outcome, decision.reason, decision.effect)
        for decision in plan.decisions
        if decision.asked.startswith(("pass", "stage"))
    ]
    assert found == [
        (
            "pass reduce",
            "applied",
            "named in the recipe",
            "36 visual tokens leave 4 rows in the cache",
        ),
        (
            "stage 1, learned_rows at projector",
            "applied",
            "class S3",
            "36 tokens and 4 rows behind them pass the decoder once, and the cache keeps the 4",
        ),
        (
            "stage 1, what learned_rows learned",
            "degraded",
            "no weights are given",
            "it is as training begins with it; write weights: FILE.safetensors",
        ),
    ]


def test_it_is_shown() -> None:
    out = StringIO()
    show_plan(planned(), Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    assert (
        "pictures  40 tokens for 6 x 6 patches; one picture is at most 4 rows of the context"
        in lines
    )
    assert (
        "hidden    36 of the 40 rows of a picture pass all layers once; the cache keeps 4" in lines
    )


@pytest.mark.parametrize(("keep", "rows"), [(0.25, 9), (4, 4), (1, 1), (1.0, 36)])
def test_a_budget_is_what_the_cache_keeps(keep: float, rows: int) -> None:
    spec = reduced(deep_spec(), method="voco", keep=keep)
    assert [part.tokens for part in spec.segments] == [rows]
    assert (spec.entering, spec.hidden) == (TOKENS + rows, TOKENS)


def test_where_nothing_is_looked_up() -> None:
    """The rows that stay are looked up in every layer, and there is no other form of that."""
    step = Reduce.model_validate({"stages": (ROWS,)})
    context = Context(device=device(Gather="fail"), targets=("static",))
    found = [x for x in step.foresee(deep_spec(), context).decisions if x.outcome == "refused"]
    assert [(x.asked, x.reason, x.effect) for x in found] == [
        (
            "stage 1, learned_rows at projector",
            "'learned_rows' works by Gather, which tiny-npu does not run",
            "choose another kind of stage, or choose another device",
        )
    ]


def test_where_only_sorting_is_lacking() -> None:
    """It sorts nothing, so that nothing is degraded."""
    step = Reduce.model_validate({"stages": (ROWS,)})
    context = Context(device=device(TopK="fail"), targets=("static",))
    assert [x.asked for x in step.foresee(deep_spec(), context).decisions] == [
        "stage 1, learned_rows at projector",
        "stage 1, what learned_rows learned",
    ]


def spread(spec: VlmSpec, **changes: Any) -> VlmSpec:
    """With another last layer of the decoder."""
    *layers, last = spec.decoder.layers
    layers.append(replace(last, **changes))
    return replace(spec, decoder=replace(spec.decoder, layers=tuple(layers)))


SPEC = deep_spec()
WINDOWED = spread(SPEC, attention=replace(SPEC.decoder.layers[0].attention, window=20))
THREE_AXES = replace(
    SPEC,
    decoder=replace(SPEC.decoder, rope=replace(SPEC.decoder.rope, sections=(4, 2, 2))),
)
REFUSED: dict[str, tuple[VlmSpec, list[dict[str, Any]], str, str]] = {
    "a cut behind it": (
        SPEC,
        [ROWS, {"at": "decoder", "layer": 1, "keep": 2, "score": "random", "select": "top"}],
        "stage 1: 'learned_rows' stand for the picture in every layer of the decoder, and stage 2 "
        "at decoder stands behind them",
        "remove it, or take tokens away before them",
    ),
    "another one behind it": (
        SPEC,
        [ROWS, {**ROWS, "keep": 2}],
        "stage 1: 'learned_rows' stand for the picture in every layer of the decoder, and stage 2 "
        "at projector stands behind them",
        "remove it, or take tokens away before them",
    ),
    "a layer of another kind": (
        spread(SPEC, mixer="mamba2"),
        [ROWS],
        "stage 1: 'learned_rows' hide rows from those behind, and decoder.layers.3 is 'mamba2', "
        "whose state stands for all rows",
        "choose a method that takes tokens away before the decoder",
    ),
    "a window": (
        WINDOWED,
        [ROWS],
        "stage 1: 'learned_rows' hide rows from those behind, and decoder.layers.3 sees a window "
        "of 20 rows, which would count them or not",
        "choose a method that takes tokens away before the decoder",
    ),
    "three axes": (
        THREE_AXES,
        [ROWS],
        "stage 1: 'learned_rows' count on from the picture along one axis, and visual tokens of "
        "this model stand on three",
        "choose a method that takes tokens away before the decoder",
    ),
    "two grids": (
        native_spec((4, 6), (8, 4)),
        [ROWS],
        "stage 1: 'learned_rows' hide one number of tokens, and pictures come in 2 grids",
        "name one grid in image.grids",
    ),
    "tokens that keep their positions": (
        SPEC,
        [{"at": "projector", "keep": 9, "select": "uniform", "place": "keep"}, ROWS],
        "stage 2: 'learned_rows' count on from the picture, and a stage before them leaves gaps "
        "between positions",
        "remove place: keep",
    ),
    "more rows than tokens": (
        SPEC,
        [{**ROWS, "keep": 37}],
        "stage 1: cannot keep 37 of the 36 tokens that come",
        "keep at most 36",
    ),
    "no rows": (
        SPEC,
        [{**ROWS, "keep": 0}],
        "stage 1: it keeps none of the 36 tokens that come",
        "keep at least one; in the decoder a stage may keep none",
    ),
    "more positions than there are": (
        replace(SPEC, decoder=replace(SPEC.decoder, max_positions=40)),
        [ROWS],
        "stage 1: 36 tokens and 4 rows behind them take the 40 positions that the model knows",
        "keep fewer, or put a stage before it that takes tokens away",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_has_no_place(name: str) -> None:
    spec, stages, message, hint = REFUSED[name]
    with pytest.raises(Complaint) as error:
        reduced(spec, *stages)
    assert (error.value.message, error.value.hint) == (message, hint)


def test_it_goes_with_no_policy_of_positions() -> None:
    problem = Problem(
        spec=SPEC,
        stages=[StageOptions.model_validate(ROWS)],
        budget=None,
        positions=PositionOptions.model_validate({"v2pe": {"step": 0.5}}),
    )
    with pytest.raises(Complaint) as error:
        problems_of(problem)
    assert (error.value.message, error.value.hint) == (
        "stage 1: 'learned_rows' count on from the picture, and v2pe places it otherwise",
        "remove positions",
    )


def test_text_is_not_fused_with_what_is_hidden_from_it() -> None:
    problem = Problem(
        spec=SPEC,
        stages=[StageOptions.model_validate(ROWS)],
        budget=None,
        fusion=FusionOptions(layers=1),
    )
    with pytest.raises(Complaint) as error:
        problems_of(problem)
    assert (error.value.message, error.value.hint) == (
        "stage 1: 'learned_rows' are all that text sees of the picture, and fused text has seen "
        "the whole of it",
        "remove fusion",
    )


STAGES = {
    "at: projector\nbottleneck: learned_rows\nplace: repack\n": (
        "stage.yaml:3:1: text behind 'learned_rows' stands where it does behind the whole "
        "picture, and nothing is counted anew\n  hint: remove place"
    ),
    "at: encoder\nbottleneck: learned_rows\n": (
        "stage.yaml:1:1: 'learned_rows' cannot stand at encoder\n  hint: choose projector"
    ),
    "at: projector\nbottleneck: learned_row\n": (
        "stage.yaml:2:13: unknown bottleneck 'learned_row'\n  hint: did you mean 'learned_rows'?"
    ),
    "at: projector\nbottleneck: learned_rows\nselect: top\n": (
        "stage.yaml:1:1: a stage has one of select, merge, transform, bottleneck, got select and "
        "bottleneck\n  hint: write one stage for each"
    ),
    "at: projector\nbottleneck: learned_rows\nscore: random\n": (
        "stage.yaml:3:1: score goes with select\n  hint: remove score"
    ),
}


@pytest.mark.parametrize("text", STAGES)
def test_what_a_stage_cannot_say(text: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_text(text, Path("stage.yaml")).parse(StageOptions)
    assert str(error.value) == STAGES[text]
