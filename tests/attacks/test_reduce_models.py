"""Stages on models that have no place for them, and pieces that graphs cannot hold."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest

from edgevlm.decisions import Decision
from edgevlm.document import Complaint
from edgevlm.model.spec import VlmSpec
from edgevlm.reduce.check import problems_of
from edgevlm.reduce.options import StageOptions
from edgevlm.reduce.piece import Choice, Site, StaticClass
from edgevlm.reduce.solve import Problem
from tests.attacks.test_reduce_recipes import of_stages, planned
from tests.edgevlm.tiny import native_spec, tiny_spec


def siglip() -> VlmSpec:
    """Without a class token."""
    spec = tiny_spec()
    vision = dataclasses.replace(spec.vision, class_token=False, drop_first_row=False)
    return dataclasses.replace(spec, vision=vision)


def with_class_token() -> VlmSpec:
    """Whose class token goes on to the decoder."""
    spec = tiny_spec()
    return dataclasses.replace(spec, vision=dataclasses.replace(spec.vision, drop_first_row=False))


def hybrid() -> VlmSpec:
    """Whose second layer is a convolution."""
    spec = tiny_spec()
    first, second = spec.decoder.layers
    layers = first, dataclasses.replace(second, mixer="short_conv")
    return dataclasses.replace(spec, decoder=dataclasses.replace(spec.decoder, layers=layers))


def joining() -> VlmSpec:
    """Whose projector joins squares of patches."""
    spec = tiny_spec()
    projector = dataclasses.replace(
        spec.projector, kind="pixel_shuffle", merge=2, hidden_width=0, activation=""
    )
    return dataclasses.replace(spec, projector=projector)


@pytest.mark.parametrize(
    ("spec", "stages", "expected"),
    [
        (
            siglip(),
            "{at: encoder, keep: 8, score: encoder_attention, select: top}",
            "reduce: stage 1: it scores by the attention of the class token, and this encoder has "
            "none\n  hint: add instead: all, which takes what every patch gives",
        ),
        (
            with_class_token(),
            "{at: encoder, keep: 8, score: encoder_attention, select: top}",
            "reduce: stage 1: it looks at attention between patches, and 17 rows leave an encoder "
            "of 4 x 4 patches\n"
            "  hint: choose a piece that looks at tokens alone, or a stage in the decoder",
        ),
        (
            hybrid(),
            "{at: decoder, layer: 1, keep: 8, score: text_attention, select: top}",
            "reduce: stage 1: decoder.layers.1 is 'short_conv', whose state stands for rows in "
            "their order\n  hint: put the stage at projector, before the decoder",
        ),
        (
            native_spec((4, 6), (8, 4)),
            "{at: decoder, layer: 1, keep: 4, score: text_attention, select: top}",
            "reduce: stage 1: pictures come in 2 grids, and a cut in the decoder takes one number "
            "of tokens\n  hint: name one grid in image.grids, or put the stage at projector",
        ),
        (
            native_spec((4, 6)),
            "{at: encoder, keep: 4, select: spread}",
            "reduce: stage 1: the projector joins squares of 2 x 2 patches, which are gone when "
            "patches are taken at encoder\n  hint: put the stage at projector",
        ),
        (
            native_spec((4, 6)),
            "{at: encoder, keep: 4, transform: fourier}",
            "reduce: stage 1: 'fourier' takes a whole grid, and the tokens lie on none\n"
            "  hint: put the stage at projector",
        ),
        (
            joining(),
            "{at: encoder.layers, keep: 8, merge: bipartite}",
            "reduce: stage 1: the projector joins squares of 2 x 2 patches, which are gone when "
            "patches are taken at encoder.layers\n  hint: put the stage at projector",
        ),
    ],
    ids=["no class", "class kept", "hybrid", "grids", "native", "native grid", "joining layers"],
)
def test_models_that_a_stage_does_not_fit(spec: VlmSpec, stages: str, expected: str) -> None:
    assert of_stages(stages, spec) == expected


def test_attention_of_all_patches_instead_is_told() -> None:
    stage = "{at: encoder, keep: 8, score: {encoder_attention: {instead: all}}, select: top}"
    plan = planned(f"  - reduce: {{stages: [{stage}]}}\n", siglip())
    told = Decision(
        asked="stage 1, attention of the class token",
        outcome="degraded",
        reason="this encoder has none",
        effect="tokens are scored by the attention they get from all patches",
    )
    assert told in plan.decisions
    assert told not in planned(f"  - reduce: {{stages: [{stage}]}}\n", tiny_spec()).decisions


class Threshold(Choice):
    """Tokens above a score, however many; known to this test alone."""

    name: ClassVar[str] = "threshold"
    static_class: ClassVar[StaticClass] = "D1"

    kept: int | None = None

    @property
    def is_calibrated(self) -> bool:
        return self.kept is not None

    def torch(self, view: Any, scores: Any, count: int) -> Any:
        return scores

    def numpy(self, view: Any, scores: Any, count: int) -> Any:
        return scores


class Asking(Threshold):
    """One that looks at the question, wherever it stands."""

    name: ClassVar[str] = "asking"
    static_class: ClassVar[StaticClass] = "S1"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"question"})


def stage_of(piece: Choice, at: Site) -> StageOptions:
    """A stage with a piece that no recipe can name."""
    stage = StageOptions.model_validate({"at": at, "keep": 4, "select": "uniform"})
    return stage.model_copy(update={"select": piece})


def complaint(piece: Choice, at: Site = "projector") -> tuple[str, str | None]:
    with pytest.raises(Complaint) as caught:
        problems_of(Problem(spec=tiny_spec(), stages=[stage_of(piece, at)], budget=None))
    return caught.value.message, caught.value.hint


def test_a_number_that_depends_on_the_picture() -> None:
    assert complaint(Threshold()) == (
        "stage 1: 'threshold' keeps a number of tokens that depends on the picture, and no "
        "calibration says how many",
        "give it a number, or choose a piece that keeps one",
    )
    calibrated = stage_of(Threshold(kept=4), "projector")
    problems_of(Problem(spec=tiny_spec(), stages=[calibrated], budget=None))


def test_the_question_is_not_there_in_the_encoder() -> None:
    assert complaint(Asking(), "encoder") == (
        "stage 1: it looks at the question, which is not there at encoder",
        "put the stage at projector or in the decoder",
    )
