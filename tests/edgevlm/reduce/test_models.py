"""Stages at their sites: what whole models make of pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgevlm.model.attention import AllRows
from edgevlm.model.spec import VlmSpec
from edgevlm.model.stages import Asking
from edgevlm.model.vlm import Vlm
from edgevlm.reduce.catalogue import load_method, method_names
from tests.edgevlm.reduce.models import joining_spec, llava_spec, reduced
from tests.edgevlm.tiny import drawn

# Rows of size three after two layers, in float32 and in another order.
TOLERANCE = 1e-5

EARLY = [
    name
    for name in method_names()
    if all(stage.at != "decoder" and not stage.bottleneck for stage in load_method(name).stages)
]


IN_SQUARES = ("avgpool", "windowed", "lowres", "llava_mini")


def makes_its_own(method: str) -> bool:
    """Whether learned rows leave in place of all tokens, however many."""
    stages = load_method(method).stages
    return any(stage.merge is not None and stage.merge.is_learned for stage in stages)


def pixels_of(spec: VlmSpec, count: int = 2) -> Tensor:
    shape = spec.vision.pixels_shape(spec.vision.grids[0])
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def asking(spec: VlmSpec) -> Asking:
    """Five rows of text, of which three ask."""
    rows = torch.randn(1, 5, spec.decoder.width, generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([[0.0, 1.0, 0.5, 1.0, 0.0]])
    return Asking(rows=rows, weights=dict.fromkeys(("text", "question", "words"), weights))


def encoded(model: Vlm) -> Tensor:
    with torch.no_grad():
        return model.encode(pixels_of(model.spec), question=asking(model.spec))


@pytest.mark.parametrize("has_class_token", [True, False])
@pytest.mark.parametrize("method", [name for name in EARLY if not makes_its_own(name)])
def test_a_method_that_keeps_all_is_the_model(method: str, has_class_token: bool) -> None:
    spec = llava_spec(class_token=has_class_token)
    model = drawn(spec)
    whole = encoded(model)
    model.stage(reduced(spec, method=method, keep=1.0))
    found = encoded(model)
    if any(stage.select is not None for stage in load_method(method).stages):
        assert torch.equal(found, whole)
    else:
        torch.testing.assert_close(found, whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("has_class_token", [True, False])
@pytest.mark.parametrize("method", EARLY)
def test_a_method_leaves_what_its_plan_says(method: str, has_class_token: bool) -> None:
    spec = llava_spec(class_token=has_class_token)
    for keep in (0.5, 0.4):
        planned = reduced(spec, method=method, keep=keep)
        found = encoded(drawn(planned))
        tokens = planned.image_tokens(planned.vision.grids[0])
        assert found.shape == (2, tokens, spec.decoder.width)
        # Windows of one size, and squares of queries or of smaller pictures, make 16, 9, 4 or 1.
        assert tokens <= keep * 16 + 1
        assert tokens >= (4 if method in IN_SQUARES else keep * 16 - 1)
        assert torch.isfinite(found).all()


def by_hand(model: Vlm, pixels: Tensor, behind: tuple[int, ...]) -> Tensor:
    """The encoder layer by layer, with torch's pooling behind some, and the projector."""
    vision, side = model.vision, 4
    x = vision.pre_norm(vision.embed(pixels))
    for index, layer in enumerate(vision.layers):
        x = layer(x, AllRows())
        if index in behind:
            picture = x[:, 1:].transpose(1, 2).unflatten(2, (side, side))
            side //= 2
            pooled = nn.functional.avg_pool2d(picture, 2).flatten(2).transpose(1, 2)
            x = torch.cat([x[:, :1], pooled], 1)
    return model.projector(x[:, 1:], (side, side))


@pytest.mark.parametrize(("layers", "keep"), [((0,), 4), ((1,), 4), ((0, 1), 1), ((0, 1), 4)])
def test_windows_stand_behind_the_last_of_their_layers(layers: tuple[int, ...], keep: int) -> None:
    spec = llava_spec()
    stage = {"at": "encoder.layers", "keep": keep, "transform": "windows", "layers": layers}
    model = drawn(reduced(spec, stage))
    # Four are left by one window, whatever more layers are named.
    behind = layers if keep == 1 else layers[-1:]
    pixels = pixels_of(spec)
    with torch.no_grad():
        wanted, seen = by_hand(model, pixels, behind), model.vision(pixels)
        found = model.encode(pixels)
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
    # The class token is none of them, and no size weighs attention.
    assert seen.tokens.grid == ((1, 1) if keep == 1 else (2, 2))
    assert seen.tokens.sizes is None


def test_windows_leave_a_grid_for_later_stages() -> None:
    stages: tuple[dict[str, Any], ...] = (
        {"at": "encoder.layers", "keep": 4, "transform": "windows", "layers": (0,)},
        {"at": "encoder", "keep": 1, "transform": "avgpool"},
    )
    spec = reduced(llava_spec(), *stages)
    assert [stage.grid_out for stage in spec.reduction.stages[0][1]] == [(2, 2), (1, 1)]
    assert encoded(drawn(spec)).shape == (2, 1, 64)


def test_merged_tokens_leave_in_order() -> None:
    for method in ("tome", "mctf", "simvlg"):
        model = drawn(reduced(llava_spec(), method=method, keep=0.5))
        with torch.no_grad():
            tokens = model.visual(pixels_of(model.spec))
        assert (tokens.places.diff(dim=1) > 0).all()
        # What was merged is known behind the encoder.
        assert tokens.sizes.sum(1).tolist() == [16.0, 16.0]


def test_a_merge_may_stand_in_some_layers() -> None:
    stage = {"at": "encoder.layers", "keep": 9, "merge": "bipartite", "layers": (1,)}
    spec = reduced(llava_spec(), stage)
    (made,) = spec.reduction.stages[0][1]
    assert (made.layer, made.count_in, made.count_out) == (1, 16, 9)
    assert encoded(drawn(spec)).shape == (2, 9, 64)


@pytest.mark.parametrize(
    ("stages", "tokens"),
    [
        ([{"at": "encoder", "keep": 0.25, "transform": "fourier"}], 4),
        ([{"at": "encoder", "keep": 36, "transform": "elastic"}], 9),
        ([{"at": "encoder", "keep": 64, "transform": "fourier"}], 16),
        ([{"at": "encoder", "transform": "avgpool"}], 4),
        (
            [
                {"at": "encoder", "keep": 0.25, "transform": "avgpool"},
                {"at": "projector", "keep": 0.5, "select": "cover"},
            ],
            2,
        ),
        (
            [
                {"at": "encoder", "keep": 36, "transform": "elastic"},
                {"at": "projector", "keep": 4, "transform": "elastic"},
            ],
            4,
        ),
    ],
)
def test_patches_that_are_joined_are_counted_as_tokens(
    stages: list[dict[str, Any]], tokens: int
) -> None:
    spec = reduced(joining_spec(), *stages, keep=0.25)
    assert spec.image_tokens((8, 8)) == tokens
    assert spec.segments[0].tokens == tokens
    assert encoded(drawn(spec)).shape == (2, tokens, 64)


def test_pooling_before_squares_are_joined_is_by_hand() -> None:
    model = drawn(reduced(joining_spec(), {"at": "encoder", "keep": 16, "transform": "avgpool"}))
    pixels = pixels_of(model.spec)
    with torch.no_grad():
        bare = drawn(replace(model.spec, reduction=None))
        features = bare.vision(pixels).tokens.features.transpose(1, 2).unflatten(2, (8, 8))
        pooled = nn.functional.avg_pool2d(features, 2).flatten(2).transpose(1, 2)
        wanted, found = model.projector(pooled, (4, 4)), model.encode(pixels)
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
