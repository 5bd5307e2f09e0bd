"""Small models with a reduction: a LLaVA of 4 x 4 patches, and one whose squares are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.reduce.catalogue import load_method
from edgevlm.reduce.check import problems_of
from edgevlm.reduce.options import StageOptions
from edgevlm.reduce.resolution import reduced as resized
from edgevlm.reduce.solve import Problem, solve
from tests.edgevlm.tiny import drawn, tiny_spec


def llava_spec(*, class_token: bool = True) -> VlmSpec:
    """The features are those of the last layer, so that stages may stand in all."""
    spec = tiny_spec()
    vision = replace(
        spec.vision, feature_layers=(2,), class_token=class_token, drop_first_row=class_token
    )
    return replace(spec, vision=vision)


def joining_spec() -> VlmSpec:
    """Pictures of 8 x 8 patches, of which the projector joins squares of 2 x 2."""
    spec = llava_spec(class_token=False)
    vision = replace(spec.vision, grids=((8, 8),))
    projector = replace(
        spec.projector, kind="pixel_shuffle", merge=2, hidden_width=0, activation=""
    )
    return replace(spec, vision=vision, projector=projector)


def reduced(
    spec: VlmSpec,
    *stages: dict[str, Any],
    method: str | None = None,
    keep: float | int | None = None,
) -> VlmSpec:
    """The spec with a method at a budget, or with stages, as the pass makes it."""
    asked: Sequence[StageOptions]
    if method is None:
        asked = [StageOptions.model_validate(stage) for stage in stages]
    else:
        asked = load_method(method).stages
    asks = any(isinstance(stage.keep, str) for stage in asked)
    problem = Problem(spec=spec, stages=asked, budget=keep if asks else None, method=method)
    problems_of(problem)
    return resized(spec, solve(problem))


@cache
def model_of(spec: VlmSpec) -> Vlm:
    """The model of a spec, without its reduction always the same."""
    return drawn(spec)
