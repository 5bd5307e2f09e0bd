"""What stages cannot do is said, with what can be done instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgevlm.document import Complaint, parse_text
from edgevlm.errors import RecipeError
from edgevlm.model.spec import VlmSpec
from edgevlm.reduce.options import StageOptions
from tests.edgevlm.reduce.models import joining_spec, llava_spec, reduced
from tests.edgevlm.tiny import native_spec, tiny_spec

MERGED = {"at": "encoder.layers", "merge": "bipartite"}
WINDOWS = {"at": "encoder.layers", "transform": "windows"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "at: encoder.layers\ntransform: windows\n",
            "stage.yaml:1:1: 'windows' names the layers it stands behind\n"
            "  hint: write layers: [5, 11], or depths: [0.25, 0.5]",
        ),
        (
            "at: encoder\nlayers: [1]\ntransform: avgpool\n",
            "stage.yaml:2:1: layers is for stages at encoder.layers, not for encoder\n"
            "  hint: remove layers",
        ),
        (
            "at: encoder.layers\nlayers: [1]\ndepths: [0.5]\nmerge: bipartite\n",
            "stage.yaml:1:1: a stage at encoder.layers names one of layers and depths\n"
            "  hint: remove depths",
        ),
        (
            "at: encoder.layers\nlayers: [1, 1]\nmerge: bipartite\n",
            "stage.yaml:2:1: layers ascend, and 1 stands behind 1\n"
            "  hint: write each of them once, in order",
        ),
        (
            "at: encoder.layers\ndepths: [0.5, 0.25]\nmerge: bipartite\n",
            "stage.yaml:2:1: depths ascend, and 0.25 stands behind 0.5\n"
            "  hint: write each of them once, in order",
        ),
        (
            "at: encoder.layers\nlayers: [-1]\nmerge: bipartite\n",
            "stage.yaml:2:10: layers.0 must be at least 0, got -1",
        ),
        (
            "at: encoder.layers\ntransform: avgpool\nlayers: [1]\n",
            "stage.yaml:1:1: 'avgpool' cannot stand at encoder.layers\n"
            "  hint: choose encoder or projector",
        ),
        (
            "at: encoder.layers\nselect: spread\n",
            "stage.yaml:1:1: 'spread' cannot stand at encoder.layers\n"
            "  hint: choose encoder or projector or decoder",
        ),
        (
            "at: projector\nmerge: fuse\n",
            "stage.yaml:1:1: 'fuse' cannot stand at projector\n  hint: choose encoder.layers",
        ),
        (
            "at: encoder\nselect: top\n",
            "stage.yaml:1:1: 'top' goes by scores, and the stage has none\n"
            "  hint: add score: encoder_attention, or another one",
        ),
        (
            "at: encoder\nselect: spread\nrest: anchors\n",
            "stage.yaml:1:1: 'anchors' goes by scores, and the stage has none\n"
            "  hint: add score: encoder_attention, or another one",
        ),
        (
            "at: encoder\nscore: random\nselect: top\nrest: neighbours\n",
            "stage.yaml:2:1: 'neighbours' weighs tokens by their scores, and those of 'random' are "
            "no shares\n  hint: score by encoder_attention",
        ),
        (
            "at: encoder\nscore: random\nselect: {top: {lattice: 3, uniform_share: 0.5}}\n",
            "stage.yaml:3:15: a lattice and a uniform share are two ways to keep evenly spaced "
            "tokens\n  hint: remove one of them",
        ),
    ],
)
def test_what_a_stage_cannot_say(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_text(text, Path("stage.yaml")).parse(StageOptions)
    assert str(error.value) == message


def grown(spec: VlmSpec, side: int) -> VlmSpec:
    return replace(spec, vision=replace(spec.vision, grids=((side, side),)))


def grouped(spec: VlmSpec) -> VlmSpec:
    """Two heads of queries share one of keys."""
    layers = tuple(
        replace(layer, attention=replace(layer.attention, num_kv_heads=1))
        for layer in spec.vision.layers
    )
    return replace(spec, vision=replace(spec.vision, layers=layers))


CASES: dict[str, tuple[VlmSpec, list[dict[str, Any]], str, str]] = {
    "a grid without windows": (
        grown(llava_spec(), 6),
        [{**WINDOWS, "keep": 5, "layers": (0, 1)}],
        "stage 1: a grid of 3 x 3 tokens has no whole windows of 2 x 2, and 5 of its 9 are to be "
        "left",
        "pool behind the encoder: write at: encoder, transform: elastic",
    ),
    "no window at all": (
        grown(llava_spec(), 5),
        [{**WINDOWS, "depths": (0.5,)}],
        "stage 1: a grid of 5 x 5 tokens has no whole windows of 2 x 2, and 24 of its 25 are to be "
        "left",
        "pool behind the encoder: write at: encoder, transform: elastic",
    ),
    "more windows than layers": (
        grown(llava_spec(), 8),
        [{**WINDOWS, "keep": 4, "layers": (1,)}],
        "stage 1: 'windows' leave 4 of 64 tokens after 2 layers, and 1 are named",
        "name more layers, or keep 16 tokens",
    ),
    "a budget below the windows": (
        grown(llava_spec(), 8),
        [{**WINDOWS, "layers": (1,)}],
        "an average of 6.4 of 64 tokens is out of reach: over 2 layers these stages leave at least "
        "16, 25.0 % (stage 1: 'windows' leave 4 of 64 tokens after 2 layers, and 1 are named)",
        "ask for 0.25 or more, or cut earlier",
    ),
    "a layer that is not there": (
        llava_spec(),
        [{**MERGED, "keep": 12, "layers": (2,)}],
        "layer 2 of an encoder of 2",
        "choose from 0 to 1",
    ),
    "two stages in one layer": (
        llava_spec(),
        [{**MERGED, "keep": 12}, {**MERGED, "keep": 10, "layers": (1,)}],
        "stage 2 at encoder.layers stands before the one that is written above it",
        "write stages in the order in which tokens pass them",
    ),
    "too many merges in a layer": (
        llava_spec(),
        [{**MERGED, "keep": 7, "layers": (1,)}],
        "stage 1: 9 of 16 tokens would be merged at once, and half is the most that find a partner",
        "keep more tokens, or merge in more steps",
    ),
    "too many merges behind the encoder": (
        llava_spec(),
        [{"at": "encoder", "keep": 2, "merge": {"bipartite": {"rounds": 2}}}],
        "stage 1: 7 of 9 tokens would be merged at once, and half is the most that find a partner",
        "keep more tokens, or merge in more steps",
    ),
    "windows of a turning encoder": (
        replace(native_spec((4, 4)), projector=tiny_spec().projector),
        [{**WINDOWS, "keep": 4, "layers": (0,)}],
        "stage 1: patches of this encoder turn with their places in every layer, and merged ones "
        "have none",
        "put the stage at projector",
    ),
    "rows that are no patches": (
        replace(llava_spec(), vision=replace(llava_spec().vision, drop_first_row=False)),
        [{**MERGED, "keep": 12}],
        "stage 1: 17 rows leave the encoder, which are not its 16 patches",
        "put the stage at encoder",
    ),
    "positions of patches that are joined": (
        joining_spec(),
        [{"at": "encoder", "keep": 16, "transform": "avgpool", "place": "keep"}],
        "stage 1: the projector joins squares of 2 x 2 patches, whose positions are not those of "
        "patches",
        "remove place, or put the stage at projector",
    ),
    "patches that are to be joined": (
        joining_spec(),
        [{"at": "encoder", "keep": 16, "select": "spread"}],
        "stage 1: the projector joins squares of 2 x 2 patches, which are gone when patches are "
        "taken at encoder",
        "put the stage at projector",
    ),
    "grouped heads as one": (
        grouped(llava_spec()),
        [{"at": "encoder", "keep": 4, "score": {"encoder_attention": {"heads": "one"}},
          "select": "top"}],
        "stage 1: it takes the heads of layer -1 as one, and 2 heads of queries share 1 of keys",
        "write heads: each",
    ),
    "attention over patches that are gone": (
        llava_spec(),
        [{"at": "projector", "keep": 8, "select": "uniform"},
         {"at": "projector", "keep": 4, "score": "encoder_attention", "select": "top"}],
        "stage 2: it looks at attention over all patches, of which a stage before it took some",
        "put it first, or choose a piece that looks at tokens alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_a_model_has_no_place_for(case: tuple[VlmSpec, list[Any], str, str]) -> None:
    spec, stages, message, hint = case
    with pytest.raises(Complaint) as error:
        reduced(spec, *stages, keep=0.1)
    assert (error.value.message, error.value.hint) == (message, hint)


def test_a_budget_between_two_grids_takes_the_smaller() -> None:
    spec = reduced(grown(llava_spec(), 8), {**WINDOWS, "depths": (0.5, 1.0)}, keep=0.9)
    assert spec.image_tokens((8, 8)) == 16
    assert [stage.layer for stage in spec.reduction.stages[0][1]] == [1]


def test_depths_that_fall_together_are_one_layer() -> None:
    spec = reduced(llava_spec(), method="windowed", keep=0.25)
    (stage,) = spec.reduction.stages[0][1]
    assert (stage.layer, stage.grid_out) == (1, (2, 2))
