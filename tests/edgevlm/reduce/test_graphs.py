"""Reductions before the decoder as graphs: captured, lowered and run, they equal the model."""

from __future__ import annotations

from typing import Any
from unittest import TestCase

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.model.graphs import ModelGraph, vision_graph
from edgevlm.model.spec import VlmSpec
from edgevlm_export.capture import capture
from edgevlm_export.lower import lower
from edgevlm_export.targets import TARGETS
from tests.edgevlm.reduce.models import joining_spec, llava_spec, reduced
from tests.edgevlm.reduce.test_models import EARLY
from tests.edgevlm.tiny import drawn
from tests.export.running import run

# Rows of size three after two layers, in float32.
TOLERANCE = 2e-5

SPECS = {name: reduced(llava_spec(), method=name, keep=0.5) for name in EARLY}
# The published twelve rounds are many nodes of one kind.
SPECS["simvlg"] = reduced(
    llava_spec(),
    {"at": "encoder", "keep": 6, "merge": {"bipartite": {"metric": "features", "rounds": 3}}},
)
# What differs from another in its constants alone is run on one target.
ALIKE = {"avgpool", "elastic", "uniform"}

STAGES: dict[tuple[str, str], tuple[VlmSpec, list[dict[str, Any]]]] = {
    ("ort", "facility"): (
        llava_spec(),
        [{"at": "projector", "keep": 5, "select": "facility"}],
    ),
    ("ort", "clusters"): (
        llava_spec(),
        [{"at": "projector", "keep": 5, "merge": "clusters"}],
    ),
    ("static", "merged by the keys of the last layer"): (
        llava_spec(),
        [{"at": "projector", "keep": 9, "merge": "bipartite"}],
    ),
    ("static", "no merge in the first layer"): (
        llava_spec(),
        [{"at": "encoder.layers", "keep": 15, "merge": "bipartite"}],
    ),
    ("static", "all that can merge"): (
        llava_spec(),
        [{"at": "encoder.layers", "keep": 8, "layers": (0,), "merge": "fuse"}],
    ),
    ("static", "queries that look at tokens"): (
        llava_spec(),
        [{"at": "encoder", "keep": 4, "merge": "resample"}],
    ),
    ("ort", "queries behind the projector"): (
        llava_spec(),
        [{"at": "projector", "keep": 1, "merge": "resample"}],
    ),
    ("static", "windows in two layers"): (
        llava_spec(),
        [{"at": "encoder.layers", "keep": 1, "layers": (0, 1), "transform": "windows"}],
    ),
    ("static", "a lattice and a pool of anchors"): (
        llava_spec(class_token=False),
        [
            {
                "at": "encoder",
                "keep": 9,
                "score": {"encoder_attention": {"by": "all"}},
                "select": {"top": {"lattice": 3}},
                "rest": {"anchors": {"share": 0.3, "pool": 2}},
            }
        ],
    ),
    ("ort", "pooled before squares are joined"): (
        joining_spec(),
        [
            {"at": "encoder", "keep": 16, "transform": "avgpool"},
            {"at": "projector", "keep": 2, "select": "cover"},
        ],
    ),
    ("static", "scored before squares are joined"): (
        joining_spec(),
        [
            {
                "at": "projector",
                "keep": 6,
                "score": {"encoder_attention": {"by": "all"}},
                "select": {"top": {"uniform_share": 0.5}},
                "rest": {"neighbours": {"count": 3}},
            }
        ],
    ),
}
METHODS = [("static", name) for name in SPECS] + [
    ("ort", name) for name in SPECS if name not in ALIKE
]


def drawn_inputs(made: ModelGraph, num_pictures: int) -> tuple[Tensor, ...]:
    """Inputs of a number of pictures, and seven rows of text."""
    generator = torch.Generator().manual_seed(num_pictures)
    sizes: dict[int | str, int] = {"N": num_pictures, "Q": 7}
    inputs = []
    for tensor in made.plan.inputs:
        numbers = torch.randn([sizes.get(n, n) for n in tensor.shape], generator=generator)
        inputs.append(numbers.abs() if "weights" in tensor.source else numbers)
    return tuple(inputs)


def equals_its_model(spec: VlmSpec, target: str) -> None:
    made = vision_graph(drawn(spec), num_images=1 if target == "static" else None)
    # A warning says that onnxsim lost names, and that the graph was left as it was before.
    with TestCase().assertNoLogs("edgevlm_export"):
        graph = lower(capture(made.module, made.plan), TARGETS[target])
    for num_pictures in (1,) if target == "static" else (1, 3):
        inputs = drawn_inputs(made, num_pictures)
        with torch.inference_mode():
            wanted = made.module(*inputs)
        feeds = {t.name: x.numpy() for t, x in zip(made.plan.inputs, inputs, strict=True)}
        (found,) = run(graph, feeds, TARGETS[target].engine.options).values()
        assert float(wanted.std()) > 0.5
        np.testing.assert_allclose(found, wanted.numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("target", "method"), METHODS)
def test_a_method_as_a_graph(target: str, method: str) -> None:
    equals_its_model(SPECS[method], target)


@pytest.mark.parametrize(("target", "name"), STAGES)
def test_stages_as_a_graph(target: str, name: str) -> None:
    spec, stages = STAGES[target, name]
    equals_its_model(reduced(spec, *stages), target)
