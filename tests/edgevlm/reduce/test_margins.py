"""I8: a rounded model keeps the tokens of the float one, but for those that score alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm.model.spec import VlmSpec
from edgevlm.model.stages import StageModule
from edgevlm.model.vlm import Vlm, place
from edgevlm.passes import Quantize, run_pass
from edgevlm.reduce.view import View
from tests.edgevlm.calibrated import context, samples_of
from tests.edgevlm.reduce.models import llava_spec, reduced
from tests.edgevlm.tiny import drawn

KEPT = 6
SCORED: dict[str, Mapping[str, Any]] = {
    "class token": {"at": "encoder", "score": {"encoder_attention": {"by": "class"}}},
    "all patches": {"at": "encoder", "score": {"encoder_attention": {"by": "all"}}},
    "predictor": {"at": "projector", "score": {"predictor": {"width": 16}}},
}


def halved(model: Vlm, spec: VlmSpec) -> Vlm:
    """With all weights rounded to float16."""
    for name, weight in list(model.named_parameters()):
        place(model, name, weight.detach().half().float())
    return model


def quantized(model: Vlm, spec: VlmSpec) -> Vlm:
    """With weights and activations of eight bits."""
    step = Quantize.model_validate({"vision": "w8a8", "projector": "w8a8"})
    run_pass(step, model, context(samples_of(spec, 3)))
    return model


def chosen(model: Vlm) -> tuple[np.ndarray, np.ndarray]:
    """Scores [B, N] and the places kept [B, k] of eight pictures."""
    shown: list[tuple[StageModule, View[torch.Tensor]]] = []
    modules = [part for part in model.modules() if isinstance(part, StageModule)]
    (module,) = modules
    hook = module.register_forward_pre_hook(
        lambda stage, arguments: shown.append((stage, arguments[0]))
    )
    shape = model.spec.vision.pixels_shape((4, 4))
    pixels = torch.randn(8, *shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        places = model.visual(pixels).places
        ((stage, view),) = shown
        score = stage.stage().score
        assert score is not None
        scores = score.torch(stage.taught(view))
    hook.remove()
    return scores.numpy(), places.numpy()


@pytest.mark.parametrize("rounded", [halved, quantized])
@pytest.mark.parametrize("name", SCORED)
def test_what_is_chosen_otherwise_scored_alike(name: str, rounded: Any) -> None:
    spec = reduced(llava_spec(), {**SCORED[name], "keep": KEPT, "select": "top"})
    scores, places = chosen(drawn(spec))
    other_scores, other_places = chosen(rounded(drawn(spec), spec))
    assert not np.array_equal(scores, other_scores)
    flips = 0
    for group in range(len(scores)):
        # A score that moves by so much can pass another that moves as far the other way.
        margin = 2 * np.abs(scores[group] - other_scores[group]).max()
        last = np.sort(scores[group])[-KEPT]
        differing = set(places[group]) ^ set(other_places[group])
        flips += len(differing) // 2
        assert all(abs(scores[group, token] - last) <= margin for token in differing)
    # Of 48 tokens kept; eight bits of a drawn encoder move more than sixteen.
    assert flips <= (1 if rounded is halved else 12)
