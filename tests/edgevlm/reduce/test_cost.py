"""What prompts cost: the published table, F(n), and small shapes counted by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgevlm.decisions import refuse
from edgevlm.model.spec import KvQuant, ProjectorSpec, VlmSpec
from edgevlm.plan import Plan, recipe_plan
from edgevlm.recipe import load_recipe
from edgevlm.reduce.cost import (
    Prompt,
    choosing_macs,
    kv_bytes,
    kv_numbers,
    layer_macs,
    prefill_macs,
    projector_macs,
    prompt_cost,
    vision_macs,
)
from edgevlm.reduce.options import StageOptions
from edgevlm.reduce.solve import Problem, solve
from tests.edgevlm.tiny import RMS_NORM, native_spec, tiny_spec

# token_reduction.md 0.4: average visual tokens, FLOPs %, KV %, to the digit that is shown there.
PUBLISHED = {
    "dense": (576, 100.0, 100.0),
    "fastv-k2-r50": (306, 59.4, 60.0),
    "fastv-k2-r75": (171, 39.4, 40.0),
    "pyramiddrop": (270, 54.2, 54.7),
    "visionzip-192": (192, 42.5, 43.1),
    "visionzip-64": (64, 23.7, 24.1),
    "duet": (191.8, 42.5, 43.1),
    "sparsevlm-192": (202.8, 44.2, 44.7),
    "divprune": (56, 22.5, 23.0),
    "p-mod": (309.2, 60.1, 60.5),  # 0.4 has 309
    "dynamic-llava-budget": (143.8, 35.4, 36.0),
    "fourier": (144, 35.4, 36.0),
    "one-token-budget": (1, 14.5, 14.8),
}
TEXT_ROWS = 35 + 64
LAYERS = 32


def published(root: Path, name: str) -> Plan:
    return recipe_plan(load_recipe(root / "recipes" / "published" / f"{name}.yaml"))


def reference_macs(rows: int) -> int:
    """F(n) of a layer of LLaVA-1.5-7B."""
    width, hidden = 4096, 11008
    return 4 * rows * width**2 + 2 * rows**2 * width + 3 * rows * width * hidden


def test_every_published_schedule_has_its_recipe(root: Path) -> None:
    recipes = (root / "recipes" / "published").glob("*.yaml")
    assert sorted(path.stem for path in recipes) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_table(name: str, root: Path) -> None:
    plan = published(root, name)
    refuse(plan.decisions)
    tokens = plan.tokens
    assert tokens.text_rows == TEXT_ROWS
    average, macs, kv = PUBLISHED[name]
    shares = tokens.percent or {"prefill": 100.0, "kv": 100.0}
    assert float(f"{tokens.average:.1f}") == average
    assert float(f"{shares['prefill']:.1f}") == macs
    assert float(f"{shares['kv']:.1f}") == kv
    # The same from the tokens of each layer, by the formula as papers have it.
    rows = [count + TEXT_ROWS for count in tokens.layers]
    assert tokens.cost.prefill == sum(reference_macs(count) for count in rows)
    assert tokens.cost.kv_numbers == 2 * 4096 * sum(rows)


def test_schedules_are_the_published_ones(root: Path) -> None:
    """The tokens of the layers, as the papers and their code have them."""
    schedules = {
        "fastv-k2-r50": [(576, 2), (288, 30)],
        "pyramiddrop": [(576, 8), (288, 8), (144, 8), (72, 8)],
        "duet": [(307, 16), (153, 8), (0, 8)],
        # Layers 2, 6 and 15 are run before what they score is pruned.
        "sparsevlm-192": [(576, 3), (300, 4), (200, 9), (110, 16)],
        "dynamic-llava-budget": [(576, 2), (115, 30)],
    }
    for name, runs in schedules.items():
        expected = [count for count, layers in runs for _ in range(layers)]
        assert list(published(root, name).tokens.layers) == expected, name


def test_anchors_are_as_many_as_published(root: Path) -> None:
    for name, anchors in (("visionzip-192", 30), ("visionzip-64", 10), ("duet", 7)):
        reduction = published(root, name).spec.reduction
        assert reduction is not None
        (stage,) = reduction.of((24, 24), "encoder")
        assert stage.extra == anchors, name


def test_a_schedule_that_skips(root: Path) -> None:
    """p-MoD: every layer has a number of its own, max(cos/2 + 1/2, 0.15) of the tokens."""
    ratios = [max((math.cos(math.pi * x / 31) + 1) / 2, 0.15) for x in range(LAYERS)]
    # Where the ratio is above 0.85, the layer is dense.
    ratios = [1.0 if ratio > 0.85 else ratio for ratio in ratios]
    assert f"{sum(ratios) / LAYERS:.4f}" == "0.5375"
    tokens = published(root, "p-mod").tokens
    assert list(tokens.layers) == [math.trunc(576 * ratio) for ratio in ratios]
    # Every such layer has rows of its own, and a product for every token of the picture.
    assert [part.end - part.first for part in tokens.segments] == [8] + [1] * 24
    assert len({part.group for part in tokens.segments}) == 1 + 16 + 1
    assert tokens.cost.choosing == 24 * 576 * 4096


@pytest.mark.parametrize("rows", [1, 99, 675, 4096])
def test_formula_is_that_of_the_papers(rows: int, root: Path) -> None:
    layer = published(root, "dense").spec.decoder.layers[0]
    assert layer_macs(layer, 4096, rows) == reference_macs(rows)


def test_a_layer_with_shared_heads_by_hand() -> None:
    """Width 64, 4 query heads and 2 key heads of 16, hidden 80, gated."""
    layer = tiny_spec().decoder.layers[0]
    projections = 7 * 64 * (64 + 32 + 32) + 7 * 64 * 64
    mlp = 3 * 7 * 64 * 80
    assert layer_macs(layer, 64, 7) == projections + 2 * 7 * 7 * 64 + mlp
    assert layer_macs(layer, 64, 7, 30) == projections + 2 * 7 * 30 * 64 + mlp
    narrow = dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, window=3))
    assert layer_macs(narrow, 64, 7) == projections + 2 * 7 * 3 * 64 + mlp
    assert layer_macs(narrow, 64, 2) == layer_macs(layer, 64, 2)


def slow_vision(spec: VlmSpec, rows: Sequence[tuple[int, int]], pairs: Sequence[int]) -> int:
    """Maps one by one: patches, then query, key, value, scores, values, out, up and down."""
    width, hidden = 32, 48
    total = spec.vision.grids[0][0] * spec.vision.grids[0][1] * spec.vision.patch_width * width
    for (attending, left), seen in zip(rows, pairs, strict=True):
        total += sum(attending * width * width for _ in ("q", "k", "v", "out"))
        total += sum(seen * width for _ in ("scores", "values"))
        total += sum(left * width * hidden for _ in ("up", "down"))
    return total


def test_an_encoder_by_hand() -> None:
    """Sixteen patches and a class token."""
    spec = tiny_spec()
    assert vision_macs(spec, (4, 4)) == slow_vision(spec, [(17, 17)] * 2, [17 * 17] * 2)


def test_an_encoder_that_merges() -> None:
    spec = tiny_spec()
    spec = dataclasses.replace(spec, vision=dataclasses.replace(spec.vision, feature_layers=(2,)))
    spec = reduced(spec, {"at": "encoder.layers", "keep": 9, "merge": "bipartite"})
    # 16 patches, 3 fewer after the first layer's attention, 4 after the second's.
    rows, pairs = [(17, 14), (14, 10)], [17 * 17, 14 * 14]
    assert vision_macs(spec, (4, 4)) == slow_vision(spec, rows, pairs)
    assert projector_macs(spec, (4, 4)) == 9 * (32 * 64 + 64 * 64)


@pytest.mark.parametrize("grid", [(4, 6), (8, 4), (10, 6), (6, 14)])
def test_windows_by_counting_pairs(grid: tuple[int, int]) -> None:
    spec = native_spec(grid)
    layer = dataclasses.replace(spec.vision.layers[0], mixer="window_attention")
    vision = dataclasses.replace(spec.vision, layers=(layer, spec.vision.layers[1]))
    places = list(itertools.product(range(grid[0]), range(grid[1])))
    windows = [(row // 4, column // 4) for row, column in places]
    pairs = sum(a == b for a in windows for b in windows)
    rows = len(places)
    expected = slow_vision(spec, [(rows, rows)] * 2, [pairs, rows * rows])
    assert vision_macs(dataclasses.replace(spec, vision=vision), grid) == expected


def test_projectors_by_hand() -> None:
    assert projector_macs(tiny_spec(), (4, 4)) == 16 * 32 * 64 + 16 * 64 * 64
    # Squares of 2 x 2 patches side by side: 128 wide.
    assert projector_macs(native_spec((4, 6)), (4, 6)) == 6 * 128 * 128 + 6 * 128 * 64
    shuffle = ProjectorSpec(
        kind="pixel_shuffle", in_width=32, out_width=64, bias=False, merge=2, norm=RMS_NORM
    )
    spec = dataclasses.replace(native_spec((4, 6)), projector=shuffle)
    assert projector_macs(spec, (4, 6)) == 6 * 128 * 64


@pytest.mark.parametrize(
    ("kv", "size"),
    [
        (None, 4.0),
        (KvQuant(dtype="int8", granularity="tensor"), 1.0),
        (KvQuant(dtype="float8_e4m3fn", granularity="channel"), 1.0),
        (KvQuant(dtype="int4", granularity="channel"), 0.5),
    ],
)
def test_a_cache_by_hand(kv: KvQuant | None, size: float) -> None:
    decoder = tiny_spec().decoder
    layers = tuple(
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, kv=kv))
        for layer in decoder.layers
    )
    decoder = dataclasses.replace(decoder, layers=layers)
    # Keys and values, two heads of 16, rows of both layers.
    assert kv_numbers(decoder, [10, 3]) == 2 * 32 * 13
    assert kv_bytes(decoder, [10, 3]) == 2 * 32 * 13 * size


def test_pictures_add_up() -> None:
    """A prompt of tiles: each is encoded, and all stand in one sequence."""
    spec = reduced(tiny_spec(), {"at": "projector", "keep": 5, "select": "spread"})
    one = prompt_cost(spec, Prompt(grid=(4, 4), text_rows=9))
    three = prompt_cost(spec, Prompt(grid=(4, 4), text_rows=9, groups=3))
    assert (three.vision, three.projector) == (3 * one.vision, 3 * one.projector)
    assert three.choosing == 3 * one.choosing == 3 * 16 * 16 * 64
    assert three.prefill == prefill_macs(spec.decoder, [3 * 5 + 9] * 2)
    assert three.kv_numbers == 2 * 32 * 2 * (3 * 5 + 9)
    assert one.total == one.vision + one.projector + one.prefill + one.choosing


def test_choosing_without_sorting_is_products() -> None:
    """Ranks, numbers of the kept rows, and a one-hot product that takes them."""
    stage = {"at": "projector", "keep": 5, "score": "random", "select": "top"}
    prompt = Prompt(grid=(4, 4), text_rows=9)
    assert choosing_macs(reduced(tiny_spec(), stage), prompt) == 0
    ranks, numbers = 16 * 16, 16 * 16 + 5 * 16
    assert choosing_macs(reduced(tiny_spec(), stage, dense=True), prompt) == (
        ranks + numbers + 5 * 16 * 64
    )


def test_costs_are_exact_for_long_prompts(root: Path) -> None:
    """Whole numbers beyond the 53 bits of a float."""
    layer = published(root, "dense").spec.decoder.layers[0]
    rows = 10_000_001
    expected = sum(
        int(np.prod(sizes, dtype=object))
        for sizes in ([4, rows, 4096, 4096], [2, rows, rows, 4096], [3, rows, 4096, 11008])
    )
    assert layer_macs(layer, 4096, rows) == expected > 2**53


def reduced(spec: VlmSpec, *stages: dict[str, object], dense: bool = False) -> VlmSpec:
    options = [StageOptions.model_validate(stage) for stage in stages]
    reduction = solve(Problem(spec=spec, stages=options, budget=None, dense=dense))
    return dataclasses.replace(spec, reduction=reduction)
