"""I1 as graphs: stages that keep all tokens run their own way, and give what no stage gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.model.graphs import vision_graph
from edgevlm.model.spec import VlmSpec
from edgevlm_export.capture import capture
from edgevlm_export.lower import lower
from edgevlm_export.targets import TARGETS
from tests.edgevlm.reduce.models import llava_spec, reduced
from tests.edgevlm.tiny import drawn
from tests.export.running import run

CLASS = {"encoder_attention": {"by": "class"}}
SELECTORS: dict[str, dict[str, Any]] = {
    "top": {"at": "encoder", "score": CLASS, "select": "top"},
    "uniform": {"at": "projector", "select": "uniform"},
    "spread": {"at": "projector", "select": "spread"},
    "cover": {"at": "projector", "select": "cover"},
    "dpp": {"at": "projector", "select": "dpp"},
    "facility": {"at": "projector", "select": "facility"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "bipartite in layers": {"at": "encoder.layers", "merge": "bipartite"},
    "fuse": {"at": "encoder.layers", "merge": "fuse"},
    "clusters": {"at": "projector", "merge": "clusters"},
    "all frequencies": {"at": "projector", "transform": "fourier"},
    "windows of one": {"at": "projector", "transform": "avgpool"},
}
TEXT = 7


def pixels_of(spec: VlmSpec) -> Tensor:
    return torch.randn(
        1, *spec.vision.pixels_shape((4, 4)), generator=torch.Generator().manual_seed(0)
    )


def given(spec: VlmSpec, target: str) -> np.ndarray:
    """The visual tokens that the vision graph of a form gives for a picture and a question."""
    made = vision_graph(drawn(spec), num_images=1 if target == "static" else None)
    graph = lower(capture(made.module, made.plan), TARGETS[target])
    feeds = {}
    for tensor in made.plan.inputs:
        if tensor.source == "pixels":
            feeds[tensor.name] = pixels_of(spec).numpy()
            continue
        shape = [TEXT if size == "Q" else int(size) for size in tensor.shape]
        numbers = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        feeds[tensor.name] = abs(numbers) if "weights" in tensor.source else numbers
    found = run(graph, feeds, TARGETS[target].engine.options)
    return found["image_embeds"]


@cache
def dense(target: str) -> np.ndarray:
    return given(llava_spec(), target)


@pytest.mark.parametrize("target", ["ort", "static"])
@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_of_all_tokens_changes_no_bit(name: str, target: str) -> None:
    spec = reduced(llava_spec(), {**SELECTORS[name], "keep": 16})
    np.testing.assert_array_equal(given(spec, target), dense(target))


@pytest.mark.parametrize("target", ["ort", "static"])
@pytest.mark.parametrize("name", OTHERS)
def test_what_merges_or_maps_nothing_is_the_identity(name: str, target: str) -> None:
    spec = reduced(llava_spec(), {**OTHERS[name], "keep": 16})
    # Rows of size three, through products with one and sums with zero in two layers.
    np.testing.assert_allclose(given(spec, target), dense(target), atol=1e-5, rtol=0)
