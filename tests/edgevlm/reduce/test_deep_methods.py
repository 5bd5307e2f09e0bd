"""What a model makes of methods within the decoder: numbers of tokens, and refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from edgevlm.errors import PassError
from edgevlm.model.spec import RopeSpec, VlmSpec
from edgevlm.reduce.catalogue import load_method
from edgevlm.reduce.piece import Choice, known
from edgevlm.reduce.plan import average_tokens
from tests.edgevlm.reduce.deep import deep_spec, staged
from tests.edgevlm.tiny import tiny_spec

METHODS = ("carve", "dart", "efficientvla", "fastv", "feather", "sparsevlm", "sparsevlm2")


def llava() -> VlmSpec:
    """Decoder layers and tokens of LLaVA-1.5-7B."""
    spec = tiny_spec()
    layer = spec.decoder.layers[0]
    return dataclasses.replace(
        spec,
        vision=dataclasses.replace(spec.vision, grids=((24, 24),)),
        decoder=dataclasses.replace(spec.decoder, layers=(layer,) * 32),
    )


def cuts_of(method: str, keep: float) -> list[tuple[int | None, int, int, int, str]]:
    """Layer, tokens in and out, tokens made, and positions of every stage."""
    stages = [
        stage.model_dump(mode="json", exclude_none=True) for stage in load_method(method).stages
    ]
    spec = staged(llava(), *stages, keep=keep)
    assert spec.reduction is not None
    return [
        (cut.layer, cut.count_in, cut.count_out, cut.extra, cut.place)
        for cut in spec.reduction.cuts
    ]


def test_sparsevlm_prunes_after_layers_2_6_and_15() -> None:
    assert cuts_of("sparsevlm", 192) == [
        (3, 576, 319, 9, "repack"),
        (7, 319, 176, 5, "repack"),
        (16, 176, 97, 3, "repack"),
    ]


def test_sparsevlm_2_keeps_positions_and_makes_no_tokens() -> None:
    assert cuts_of("sparsevlm2", 192) == [
        (3, 576, 319, 0, "keep"),
        (7, 319, 176, 0, "keep"),
        (16, 176, 97, 0, "keep"),
    ]
    for stage in load_method("sparsevlm2").stages:
        # 14 of 32 heads.
        assert round(32 * getattr(stage.score, "top_heads", 0)) == 14


@pytest.mark.parametrize(
    ("method", "keep", "cut"),
    [
        ("dart", 192, (5, 576, 121, 0, "keep")),
        ("efficientvla", 192, (2, 576, 166, 0, "keep")),
        ("carve", 400, (20, 576, 107, 0, "keep")),
    ],
)
def test_one_cut(method: str, keep: int, cut: tuple[int, int, int, int, str]) -> None:
    assert cuts_of(method, keep) == [cut]


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_is_the_average_over_layers(method: str) -> None:
    stages = [
        stage.model_dump(mode="json", exclude_none=True) for stage in load_method(method).stages
    ]
    for keep in (0.7, 0.9):
        spec = staged(llava(), *stages, keep=keep)
        assert abs(average_tokens(spec.segments) - keep * 576) < 1.0


@pytest.mark.skipif("facility" not in known(Choice), reason="its first stage is another's")
def test_catp_takes_half_before_the_decoder_and_half_within() -> None:
    stages = load_method("catp").stages
    assert [stage.at for stage in stages] == ["projector", "decoder"]
    assert [stage.keep for stage in stages] == ["budget", "budget^2"]


def refused(spec: VlmSpec, *stages: dict[str, Any]) -> str:
    """What is said of stages that cannot be."""
    with pytest.raises(PassError) as error:
        staged(spec, *stages)
    return str(error.value)


def cut(layer: int = 1, **more: Any) -> dict[str, Any]:
    """A stage of the decoder."""
    stage: dict[str, Any] = {"at": "decoder", "layer": layer, "keep": 9, "select": "top"}
    return {**stage, "score": "text_attention", **more}


@pytest.mark.parametrize("place", [None, "keep"])
def test_tokens_made_of_others_have_no_positions_to_keep(place: str | None) -> None:
    assert refused(deep_spec(), cut(rest="recycle", place=place)) == (
        "reduce: stage 1: 'recycle' makes tokens of others, which have no positions to keep\n"
        "  hint: write place: repack"
    )


def test_positions_are_not_kept_behind_a_stage_that_counted_anew() -> None:
    stages = cut(1, place="repack"), cut(2, keep=4, place="keep")
    assert refused(deep_spec(), *stages) == (
        "reduce: stage 2: it keeps positions, which a stage before it has counted anew\n"
        "  hint: write place: repack"
    )
    assert staged(deep_spec(), cut(1), cut(2, keep=4, place="repack")).segments[2].is_packed


def test_positions_of_three_axes_are_not_counted_anew() -> None:
    spec = deep_spec()
    rope = RopeSpec(inv_freq=spec.decoder.rope.inv_freq, sections=(2, 3, 3))
    spec = dataclasses.replace(spec, decoder=dataclasses.replace(spec.decoder, rope=rope))
    assert refused(spec, cut(place="repack")) == (
        "reduce: stage 1: positions have a row and a column of the grid, and cannot be counted "
        "anew within the decoder\n"
        "  hint: write place: keep"
    )
    assert staged(spec, cut()).segments[1].tokens == 9


def test_no_more_heads_than_there_are() -> None:
    score = {"text_attention": {"top_heads": 5}}
    assert refused(deep_spec(), cut(score=score)) == (
        "reduce: stage 1: it goes by the best 5 heads of 4\n"
        "  hint: write a share of the heads, such as top_heads: 0.5"
    )
    for heads in (4, 0.5):
        assert staged(deep_spec(), cut(score={"text_attention": {"top_heads": heads}})).segments
