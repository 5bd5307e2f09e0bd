"""Smaller pictures and left-out patches: positions interpolated, the same at full resolution."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgevlm.errors import PassError
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.reduce.catalogue import load_method
from edgevlm.reduce.resolution import reduced as spec_of
from edgevlm.reduce.transforms.resize import Resize
from edgevlm_runtime.image import FixedGeometry, ImageSpec, TiledGeometry, prepare
from tests.edgevlm.reduce.placing import foreseen, llava_spec, qwen_spec, reduced, reduction
from tests.edgevlm.tiny import drawn

RESIZE = {"at": "input", "transform": "resize"}
DROP = {"at": "input", "score": "random", "select": "top"}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def wide_spec(*, class_token: bool = True) -> VlmSpec:
    """6 x 9 patches of a picture that is not square."""
    spec = llava_spec()
    image = ImageSpec.from_json(spec.image)
    geometry = FixedGeometry(size=(48, 72))
    return dataclasses.replace(
        spec,
        vision=dataclasses.replace(
            spec.vision, grids=((6, 9),), class_token=class_token, drop_first_row=class_token
        ),
        image=dataclasses.replace(image, geometry=geometry, tokens=(54,)).to_json(),
    )


@pytest.mark.parametrize(("old", "new"), [(24, 16), (24, 12), (27, 19), (7, 5), (6, 4), (3, 1)])
def test_a_side_is_interpolated_as_torch_does(old: int, new: int) -> None:
    line = torch.randn(
        1, 4, old, 1, generator=torch.Generator().manual_seed(old), dtype=torch.float64
    )
    wanted = torch.nn.functional.interpolate(line, size=(new, 1), mode="bicubic")[0, :, :, 0]
    found = Resize().matrix(old, new) @ line[0, :, :, 0].T.numpy()
    np.testing.assert_allclose(found, wanted.T.numpy(), atol=1e-12, rtol=0)


def test_the_same_size_is_left_alone() -> None:
    np.testing.assert_array_equal(Resize().matrix(9, 9), np.eye(9))


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(("keep", "grid"), [(24, (4, 6)), (53, (5, 8)), (6, (2, 3))])
def test_positions_are_those_of_torch(class_token: bool, keep: int, grid: tuple[int, int]) -> None:
    """On the table in two dimensions; the class token's row stays."""
    model = drawn(wide_spec(class_token=class_token))
    assert model.vision.embed.position is not None
    table = model.vision.embed.position.weight.detach().clone()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    reduced(model, stages=[{**RESIZE, "keep": keep}])
    first = int(class_token)
    cells = table[first:].reshape(1, 6, 9, -1).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(cells, size=grid, mode="bicubic", align_corners=False)
    after = model.vision.embed.position.weight
    assert after.shape == (first + grid[0] * grid[1], table.shape[1])
    # Weights in float64 here, in float32 there.
    torch.testing.assert_close(
        after[first:], wanted[0].flatten(1).T, atol=2e-6 * float(table.abs().max()), rtol=0
    )
    assert torch.equal(after[:first], table[:first])
    changed = {
        name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])
    }
    assert changed == {"vision.embed.position.weight"}


def test_a_smaller_picture_is_seen_by_the_same_layers() -> None:
    """What the model makes of it is what a model of that size with that table makes."""
    model = drawn(wide_spec())
    change = reduced(model, stages=[{**RESIZE, "keep": 24}])
    spec = model.spec
    assert change.sites == ("vision.embed.position",)
    assert change.measures == {"visual_tokens_before": 54, "visual_tokens": 24}
    assert (spec.vision.grids, spec.image["tokens"]) == (((4, 6),), [24])
    assert spec.vision.pixels_shape((4, 6)) == (3, 32, 48)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8))
    prepared = prepare(picture, ImageSpec.from_json(spec.image))
    pixels = torch.from_numpy(prepared.feeds[0]["pixels"])
    assert (pixels.shape, prepared.num_tokens) == ((1, 3, 32, 48), 24)
    small = Vlm(dataclasses.replace(spec, reduction=None)).eval()
    small.load_state_dict(model.state_dict())
    assert torch.equal(model.encode(pixels), small.encode(pixels))
    assert model.encode(pixels).shape == (1, 24, 64)


@pytest.mark.parametrize("stage", [RESIZE, DROP, {"at": "input", "select": "uniform"}])
def test_at_full_resolution_nothing_changes(stage: dict[str, Any]) -> None:
    model = drawn(llava_spec())
    before, weights = model.encode(PIXELS), dict(model.named_parameters())
    old = model.spec
    reduced(model, stages=[{**stage, "keep": 1.0}])
    assert torch.equal(model.encode(PIXELS), before)
    assert {name: id(weight) for name, weight in model.named_parameters()} == {
        name: id(weight) for name, weight in weights.items()
    }
    assert (model.spec.image, model.spec.vision) == (old.image, old.vision)


@pytest.mark.parametrize(
    ("geometry", "smaller"),
    [
        (FixedGeometry(size=(32, 32)), FixedGeometry(size=(16, 16))),
        (
            FixedGeometry(shortest_edge=32, crop=(32, 32)),
            FixedGeometry(shortest_edge=16, crop=(16, 16)),
        ),
        # What is cut away at the borders is the same share of the picture.
        (
            FixedGeometry(shortest_edge=37, crop=(32, 32), pad_colour=(1, 2, 3)),
            FixedGeometry(shortest_edge=18, crop=(16, 16), pad_colour=(1, 2, 3)),
        ),
        (
            FixedGeometry(size=(40, 48), crop=(32, 32)),
            FixedGeometry(size=(20, 24), crop=(16, 16)),
        ),
    ],
)
def test_what_a_picture_shows_stays(geometry: FixedGeometry, smaller: FixedGeometry) -> None:
    spec = llava_spec()
    image = dataclasses.replace(ImageSpec.from_json(spec.image), geometry=geometry)
    after = foreseen(
        dataclasses.replace(spec, image=image.to_json()), stages=[{**RESIZE, "keep": 4}]
    )
    assert ImageSpec.from_json(after.image) == dataclasses.replace(
        image, geometry=smaller, tokens=(4,)
    )


def test_pixels_that_no_patch_read_are_no_more() -> None:
    """A side of 35 pixels has 4 patches of 8, and 3 pixels beside them."""
    spec = llava_spec()
    image = ImageSpec.from_json(spec.image)
    image = dataclasses.replace(image, geometry=FixedGeometry(size=(35, 35)))
    odd = dataclasses.replace(
        spec, vision=dataclasses.replace(spec.vision, image_size=35), image=image.to_json()
    )
    after = foreseen(odd, stages=[{**RESIZE, "keep": 9}])
    assert after.vision.pixels_shape((3, 3)) == (3, 24, 24)
    assert ImageSpec.from_json(after.image).geometry == FixedGeometry(size=(24, 24))


@pytest.mark.parametrize(
    ("grid", "count", "wanted"),
    [
        ((24, 24), 144, (12, 12)),
        ((24, 24), 143, (11, 11)),
        ((24, 24), 1, (1, 1)),
        ((6, 9), 30, (4, 6)),
        ((4, 12), 20, (2, 6)),
    ],
)
def test_grids_keep_their_shape(grid: tuple[int, int], count: int, wanted: tuple[int, int]) -> None:
    assert Resize().grid(grid, count) == wanted


@pytest.mark.parametrize("stage", [DROP, {"at": "input", "select": "uniform"}])
def test_left_out_patches_never_enter_the_encoder(stage: dict[str, Any]) -> None:
    """What is left is what the layers make of these rows alone, and the same for all pictures."""
    model = drawn(llava_spec())
    vision = model.vision
    whole = vision.entered(PIXELS, None, (4, 4)).x
    reduced(model, stages=[{**stage, "keep": 7}])
    rows = vision.entered(PIXELS, None, (4, 4))
    places = rows.tokens.places
    assert rows.x.shape == (2, 8, 32)
    assert (places == places[:1]).all()
    kept = [0, *(1 + place for place in places[0].tolist())]
    assert torch.equal(rows.x, whole[:, kept])
    seen = vision(PIXELS).tokens
    assert torch.equal(seen.places, places)
    x = whole[:, kept]
    for layer in vision.layers[:1]:
        x = layer(x, vision._keys("attention", None))
    assert torch.equal(seen.features, x[:, 1:])
    assert model.encode(PIXELS).shape == (2, 7, 64)
    assert model.spec.image["tokens"] == [7]


def test_what_is_left_may_be_chosen_from() -> None:
    """A choice by the class token's attention among the patches that entered."""
    model = drawn(llava_spec())
    stages = [
        {**DROP, "keep": 9},
        {"at": "encoder", "keep": 4, "score": "encoder_attention", "select": "top"},
    ]
    reduced(model, stages=stages)
    seen = model.vision(PIXELS).tokens
    entered = model.vision.entered(PIXELS, None, (4, 4)).tokens.places[0].tolist()
    assert all(set(places) < set(entered) for places in seen.places.tolist())
    assert model.encode(PIXELS).shape == (2, 4, 64)


def test_both_go_together() -> None:
    model = drawn(wide_spec())
    reduced(model, stages=[{**RESIZE, "keep": 24}, {**DROP, "keep": 0.5}])
    assert model.spec.image["tokens"] == [12]
    assert model.encode(torch.zeros(1, 3, 32, 48)).shape == (1, 12, 64)


@pytest.mark.parametrize(("name", "keep", "tokens"), [("lowres", 0.25, 4), ("patchdrop", 0.5, 8)])
def test_methods(name: str, keep: float, tokens: int) -> None:
    assert load_method(name).stages[0].at == "input"
    assert foreseen(llava_spec(), method=name, keep=keep).image["tokens"] == [tokens]


def refusal(spec: VlmSpec, **options: Any) -> str:
    with pytest.raises(PassError) as error:
        foreseen(spec, **options)
    return str(error.value)


def test_pictures_of_other_kinds_are_refused() -> None:
    assert refusal(qwen_spec(), stages=[{**RESIZE, "keep": 4}]) == (
        "reduce: stage 1: pictures of this model are native, and only those of one fixed size can "
        "be smaller\n  hint: name smaller grids in image.grids"
    )
    assert refusal(qwen_spec(), stages=[{**DROP, "keep": 4}]) == (
        "reduce: stage 1: the projector joins squares of 2 x 2 patches, which are gone when "
        "patches are taken at input\n  hint: put the stage at projector"
    )
    spec = llava_spec()
    image = ImageSpec.from_json(spec.image)
    tiled = dataclasses.replace(image, geometry=TiledGeometry(longest_edge=64, tile=32)).to_json()
    assert refusal(dataclasses.replace(spec, image=tiled), stages=[{**RESIZE, "keep": 4}]) == (
        "reduce: stage 1: pictures of this model are tiled, and only those of one fixed size can "
        "be smaller\n  hint: put the stage at projector"
    )
    cut = dataclasses.replace(image, geometry=FixedGeometry(crop=(32, 32))).to_json()
    assert refusal(dataclasses.replace(spec, image=cut), stages=[{**RESIZE, "keep": 4}]) == (
        "reduce: pictures are cut to their size and not resized, so that smaller ones would show "
        "less\n  hint: put the stage at projector"
    )
    bucketed = dataclasses.replace(spec.vision, position="bucketed")
    assert refusal(dataclasses.replace(spec, vision=bucketed), stages=[{**RESIZE, "keep": 4}]) == (
        "reduce: stage 1: positions of patches are bucketed, and only a learned table is "
        "interpolated\n  hint: put the stage at projector"
    )


def test_other_refusals() -> None:
    spec = llava_spec()
    assert refusal(spec, stages=[{**RESIZE, "keep": 4, "place": "keep"}]) == (
        "reduce: stage 1: a smaller picture has positions of its own\n  hint: remove place"
    )
    for piece in ({"select": "spread"}, {"score": "encoder_attention", "select": "top"}):
        with pytest.raises(ValueError, match=r"'(spread|encoder_attention)' cannot stand at input"):
            reduction(stages=[{"at": "input", "keep": 4, **piece}])
    whole = dataclasses.replace(spec.vision, drop_first_row=False)
    assert refusal(dataclasses.replace(spec, vision=whole), stages=[{**DROP, "keep": 4}]) == (
        "reduce: stage 1: 17 rows leave an encoder of 4 x 4 patches, and the one that is no patch "
        "cannot be told apart\n  hint: put the stage at encoder"
    )
    stages = [{**DROP, "keep": 9}, {**RESIZE, "keep": 4}]
    assert refusal(spec, stages=stages) == (
        "reduce: stage 2: 'resize' takes a whole grid, and the tokens lie on none\n"
        "  hint: put it before stages that select or merge"
    )


def test_a_class_token_among_the_tokens_stays_one() -> None:
    """Of 17 tokens at most 10 are asked for: 9 patches, and the class token."""
    spec = llava_spec()
    whole = dataclasses.replace(
        spec,
        vision=dataclasses.replace(spec.vision, drop_first_row=False),
        image={**spec.image, "tokens": [17]},
    )
    model = drawn(whole)
    reduced(model, stages=[{**RESIZE, "keep": 10}])
    assert model.spec.image["tokens"] == [10]
    assert model.encode(torch.zeros(1, 3, 24, 24)).shape == (1, 10, 64)


def test_a_spec_without_such_a_stage_is_left_alone() -> None:
    spec = llava_spec()
    found = foreseen(spec, method="uniform", keep=0.5).reduction
    assert found is not None
    assert spec_of(spec, found) == dataclasses.replace(spec, reduction=found)
