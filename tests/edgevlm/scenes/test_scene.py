"""Scenes: the same for ever, laid out as promised, and never in two splits."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from edgevlm.scenes import SPLITS, Scene, draw_scene, make_scene
from edgevlm.scenes.dense import GRID, IGNORED, PATCH_TARGETS, SIGN_OWNER, patch_targets
from edgevlm.scenes.scene import box_cells, check_split, spare_signs
from edgevlm.scenes.words import COLOURS, REGIONS, SHAPES, SIGN_CHARACTERS
from edgevlm_runtime.errors import InputError

SCENES = [make_scene(seed) for seed in range(SPLITS["train"].start, 1500)]


def test_facts_never_change() -> None:
    facts = repr([make_scene(seed) for seed in range(40)])
    assert hashlib.sha256(facts.encode()).hexdigest()[:16] == "6f903140960056b5"


def test_pixels_never_change() -> None:
    pixels = b"".join(draw_scene(make_scene(seed)).tobytes() for seed in range(40))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "0821ed4232614d10"


def test_counts_and_signs() -> None:
    counts = Counter(len(scene.things) for scene in SCENES)
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    assert sum(counts[count] for count in (4, 5, 6)) / len(SCENES) >= 1 / 3
    signs = [scene for scene in SCENES if scene.sign is not None]
    # Three standard deviations of a share of 0.4 among 1,500.
    assert abs(len(signs) / len(SCENES) - 0.4) < 0.038
    assert max(len(scene.things) for scene in signs) == 4


def test_looks_are_spread_evenly() -> None:
    things = [thing for scene in SCENES for thing in scene.things]
    for names, key in ((COLOURS, "colour"), (SHAPES, "shape"), (REGIONS, "region")):
        counts = Counter(getattr(thing, key) for thing in things)
        assert set(counts) == set(names)
        assert min(counts.values()) > 0.75 * len(things) / len(names)


def test_layout() -> None:
    for scene in SCENES:
        boxes = [thing.box for thing in scene.things]
        regions = [thing.region for thing in scene.things]
        if scene.sign is not None:
            boxes.append(scene.sign.box)
            regions.append(scene.sign.region)
        assert len(set(regions)) == len(regions)
        for left, top, right, bottom in boxes:
            assert left >= 1
            assert top >= 1
            assert right <= 95
            assert bottom <= 95
            for low, high in ((left, right), (top, bottom)):
                assert min(abs((low + high) / 2 - line) for line in (32, 64)) >= 3
        for first, second in itertools.combinations(boxes, 2):
            apart_across = max(first[0], second[0]) - min(first[2], second[2])
            apart_down = max(first[1], second[1]) - min(first[3], second[3])
            assert max(apart_across, apart_down) >= 2


def test_signs_hold_known_characters_and_no_numbers() -> None:
    for scene in SCENES:
        if scene.sign is not None:
            text = scene.sign.text
            assert 2 <= len(text) <= 4
            assert set(text) <= set(SIGN_CHARACTERS)
            assert not any(a.isdigit() and b.isdigit() for a, b in itertools.pairwise(text))


def test_objects_stand_out_where_the_facts_say() -> None:
    """The middle of an object has its colour: nearest of the eight by hue-free distance."""
    paint = {
        "red": (212, 44, 44),
        "orange": (240, 138, 30),
        "yellow": (238, 220, 60),
        "green": (58, 168, 66),
        "cyan": (72, 206, 216),
        "blue": (52, 84, 222),
        "purple": (152, 66, 190),
        "white": (240, 240, 240),
    }
    for scene in SCENES[:100]:
        pixels = np.asarray(draw_scene(scene)).astype(float)
        for thing in scene.things:
            x, y = thing.left + thing.side // 2, thing.top + thing.side // 2
            seen = pixels[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1))
            distances = {
                name: np.abs(seen - np.array(level)).sum() for name, level in paint.items()
            }
            assert min(distances, key=distances.__getitem__) == thing.colour


def test_box_cells_cover_the_box() -> None:
    for scene in SCENES[:200]:
        for thing in scene.things:
            left, top, right, bottom = thing.box
            cells = box_cells(thing.box)
            assert all(0 <= cell <= 31 for cell in cells)
            assert cells[0] * 3 <= left < cells[0] * 3 + 3
            assert cells[1] * 3 <= top < cells[1] * 3 + 3
            assert cells[2] * 3 < right <= cells[2] * 3 + 3
            assert cells[3] * 3 < bottom <= cells[3] * 3 + 3


def test_patch_targets_against_pixel_counts() -> None:
    """Each patch names the box that covers most of it, if that is 30 % or more."""
    columns = {name: index for index, name in enumerate(PATCH_TARGETS)}
    for scene in SCENES[:60]:
        owners = np.full((96, 96), -1)
        boxes = [thing.box for thing in scene.things]
        if scene.sign is not None:
            boxes.append(scene.sign.box)
        for number, (left, top, right, bottom) in enumerate(boxes):
            owners[top:bottom, left:right] = number
        targets = patch_targets(scene).reshape(GRID, GRID, -1)
        for row, column in itertools.product(range(GRID), range(GRID)):
            patch = owners[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            cover = [int((patch == number).sum()) for number in range(len(boxes))]
            target = targets[row, column]
            if max(cover) <= 0.3 * 64:
                assert target[columns["owner"]] == 0
                assert target[columns["left"]] == IGNORED
                continue
            covers = [number for number, count in enumerate(cover) if count == max(cover)]
            cells = [box_cells(boxes[number]) for number in covers]
            assert tuple(target[columns["left"] :]) in cells
            is_sign = [number == len(scene.things) for number in covers]
            assert (target[columns["owner"]] == SIGN_OWNER) in is_sign


def test_splits_are_disjoint_and_enforced() -> None:
    for first, second in itertools.combinations(SPLITS.values(), 2):
        assert first.stop <= second.start or second.stop <= first.start
    with pytest.raises(InputError) as caught:
        check_split("train", SPLITS["evaluation"].start)
    assert str(caught.value) == (
        "seed 1100000000 is outside the train split, 0 to 999999999\n"
        "  hint: draw seeds from edgevlm.scenes.SPLITS"
    )
    with pytest.raises(InputError) as caught:
        check_split("test", 0)
    assert str(caught.value) == (
        "'test' is not a split\n  hint: use one of calibration, evaluation, train"
    )


def test_spare_signs_fit_beside_everything() -> None:
    for scene in SCENES[:200]:
        boxes = [thing.box for thing in scene.things]
        boxes += [] if scene.sign is None else [scene.sign.box]
        boxes += [sign.box for sign in spare_signs(scene)]
        for first, second in itertools.combinations(boxes, 2):
            apart_across = max(first[0], second[0]) - min(first[2], second[2])
            apart_down = max(first[1], second[1]) - min(first[3], second[3])
            assert max(apart_across, apart_down) >= 2


def test_import_is_light() -> None:
    code = (
        "import sys, edgevlm.scenes; "
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_scene_is_a_value() -> None:
    first, second = make_scene(5), make_scene(5)
    assert isinstance(first, Scene)
    assert first == second
    assert first != make_scene(6)
