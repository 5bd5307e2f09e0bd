"""Position policies that contradict a model, its stages or themselves, and the remedies."""

from __future__ import annotations

from typing import Any

import pytest

from edgevlm.errors import PassError
from edgevlm.reduce.positions import PositionOptions
from tests.edgevlm.reduce.placing import foreseen, llava_spec, qwen_spec, reduction
from tests.edgevlm.reduce.test_positions import UNIFORM


def refusal(spec: Any, **options: Any) -> str:
    with pytest.raises(PassError) as error:
        foreseen(spec, **options)
    return str(error.value)


CUT = {"at": "decoder", "layer": 1, "keep": 4, "score": "text_attention", "select": "top"}
MERGE = {"at": "encoder", "keep": 12, "merge": "bipartite"}


@pytest.mark.parametrize(
    ("policy", "name"),
    [({"v2pe": {"step": 0.5}}, "v2pe"), ({"share": "all"}, "share"), ({"ppe": {"axes": 2}}, "ppe")],
)
def test_cuts_that_count_anew_are_refused(policy: dict[str, Any], name: str) -> None:
    stages = [MERGE, {**CUT, "place": "repack"}]
    assert refusal(llava_spec(), stages=stages, positions=policy) == (
        "reduce: stage 2: positions are counted anew in the decoder, which takes those that count "
        f"by one, and {name} gives others\n  hint: write place: keep, or choose a method whose "
        "stages keep positions"
    )
    assert foreseen(llava_spec(), stages=[MERGE, CUT], positions=policy).reduction is not None


def test_cuts_that_count_anew_want_positions_that_count_by_one() -> None:
    stages = [{**UNIFORM, "place": "keep"}, {**CUT, "keep": 2, "place": "repack"}]
    assert refusal(llava_spec(), stages=stages) == (
        "reduce: stage 2: positions are counted anew in the decoder, which takes those that count "
        "by one, and place: keep of stage 1 gives others\n  hint: write place: keep, or choose a "
        "method whose stages keep positions"
    )
    stages[0] = UNIFORM
    assert foreseen(llava_spec(), stages=stages).image["spans"] is None


@pytest.mark.parametrize(
    ("policy", "name"), [({"share": "all"}, "share"), ({"ppe": {"axes": 2}}, "ppe")]
)
def test_tokens_have_one_policy(policy: dict[str, Any], name: str) -> None:
    stages = [{**MERGE, "place": "keep"}]
    assert refusal(llava_spec(), stages=stages, positions=policy) == (
        f"reduce: stage 1: tokens cannot keep their positions and have those of {name}\n"
        "  hint: remove place"
    )


def test_other_refusals() -> None:
    row = {"share": "row"}
    assert refusal(qwen_spec(), positions={"v2pe": {"step": 0.5}}) == (
        "reduce: v2pe counts along one axis, and visual tokens of this model stand on three\n"
        "  hint: choose share or ppe, or lower the resolution"
    )
    assert refusal(llava_spec(), stages=[UNIFORM], positions=row) == (
        "reduce: tokens share the positions of rows, and lie on no grid\n"
        "  hint: write share: all, or reduce with a transform"
    )
    assert refusal(llava_spec(), stages=[UNIFORM], positions={"ppe": {"axes": 2}}) == (
        "reduce: ppe gives merged tokens the places of their members, and no stage merges any\n"
        "  hint: name a method or a stage that merges, such as merge: bipartite"
    )
    pool = {"at": "encoder", "keep": 4, "transform": "avgpool"}
    late = {"at": "projector", "keep": 3, "merge": "clusters"}
    assert refusal(llava_spec(), stages=[pool, late], positions={"ppe": {"axes": 2}}) == (
        "reduce: stage 1: 'avgpool' mixes tokens of a whole grid, which have no places of their "
        "own for ppe\n  hint: merge tokens instead"
    )
    assert refusal(llava_spec(), stages=[MERGE], positions={"ppe": {"axes": 3}}) == (
        "reduce: 8 rotary frequencies are not 3 blocks of one size\n"
        "  hint: choose axes from 1, 2, 4, 8"
    )


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        (
            {"share": "all", "ppe": {"axes": 2}},
            "positions have one of v2pe, share, ppe, got share and ppe",
            "write v2pe: {step: 0.25}, share: row, or ppe: {axes: 8}",
        ),
        (
            {},
            "positions have one of v2pe, share, ppe, got none",
            "write v2pe: {step: 0.25}, share: row, or ppe: {axes: 8}",
        ),
    ],
)
def test_one_policy_is_written(data: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ValueError, match="positions have one of") as error:
        PositionOptions.model_validate(data)
    complaint = error.value.errors()[0]["ctx"]["error"]  # type: ignore[attr-defined]
    assert (complaint.message, complaint.hint) == (message, hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a reduction has either a method or stages"),
        (
            {"method": "uniform", "stages": [UNIFORM]},
            "a reduction has either a method or stages",
        ),
        (
            {"positions": {"share": "all"}, "keep": 0.5},
            "keep is a budget of stages, and there are none",
        ),
    ],
)
def test_what_stands_alone(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduction(**options)
