"""Dense targets of the vision encoder: what lies under each patch, and what the picture holds.

Every patch names its owner, the object or sign whose box covers most of it: what it is, how
large, where its box is. Patches of a sign also name the character under their middle. The class
token names the facts of the whole picture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgevlm.scenes.scene import Scene, Sign, box_cells
from edgevlm.scenes.words import COLOURS, REGIONS, SHAPES, SIDE, SIGN_CHARACTERS

PATCH = 8
GRID = SIDE // PATCH
NUM_PATCHES = GRID * GRID

# Owner classes: background, every colour and shape, sign.
NUM_OWNERS = len(COLOURS) * len(SHAPES) + 2
SIGN_OWNER = NUM_OWNERS - 1
IGNORED = -100

# One row per patch: these columns, each a classification over that many classes.
PATCH_TARGETS = {
    "owner": NUM_OWNERS,
    "size": 2,
    "region": len(REGIONS),
    "character": len(SIGN_CHARACTERS) + 1,
    "position": 4,
    "left": 32,
    "top": 32,
    "right": 32,
    "bottom": 32,
}
# Presence of each colour, shape and sign, then the number of objects.
NUM_PRESENCES = len(COLOURS) + len(SHAPES) + 1
NUM_COUNTS = 7

_LEAST_COVER = 0.3 * PATCH * PATCH
_COLUMN = {name: index for index, name in enumerate(PATCH_TARGETS)}


def patch_targets(scene: Scene, spare: tuple[Sign, ...] = ()) -> NDArray[np.int64]:
    """Targets of a scene's patches, one row per patch, `IGNORED` where there is nothing to say."""
    targets = np.full((GRID, GRID, len(PATCH_TARGETS)), IGNORED, dtype=np.int64)
    targets[..., _COLUMN["owner"]] = 0
    targets[..., _COLUMN["character"]] = 0
    most = np.full((GRID, GRID), _LEAST_COVER)
    for thing in scene.things:
        owner = 1 + COLOURS.index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)
        size = int(thing.size == "large")
        owned = _claim(most, thing.box)
        targets[owned, :3] = (owner, size, REGIONS.index(thing.region))
        targets[owned, _COLUMN["left"] :] = box_cells(thing.box)
    for sign in spare if scene.sign is None else (scene.sign, *spare):
        owned = _claim(most, sign.box)
        targets[owned, :3] = (SIGN_OWNER, IGNORED, REGIONS.index(sign.region))
        targets[owned, _COLUMN["left"] :] = box_cells(sign.box)
        _mark_characters(targets, owned, sign)
    return targets.reshape(NUM_PATCHES, -1)


def picture_targets(scene: Scene, spare: tuple[Sign, ...] = ()) -> NDArray[np.float32]:
    """What is present in a scene, as zeros and ones, and at the end the number of objects."""
    colours = {thing.colour for thing in scene.things}
    shapes = {thing.shape for thing in scene.things}
    values = [float(colour in colours) for colour in COLOURS]
    values += [float(shape in shapes) for shape in SHAPES]
    values += [float(bool(spare) or scene.sign is not None), float(len(scene.things))]
    return np.array(values, dtype=np.float32)


def _claim(most: NDArray[np.float64], box: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    """The patches that a box covers more than any box before; updates `most`."""
    edges = np.arange(GRID) * PATCH
    wide = np.clip(np.minimum(edges + PATCH, box[2]) - np.maximum(edges, box[0]), 0, None)
    high = np.clip(np.minimum(edges + PATCH, box[3]) - np.maximum(edges, box[1]), 0, None)
    cover = np.outer(high, wide)
    owned = cover > most
    most[owned] = cover[owned]
    return owned


def _mark_characters(targets: NDArray[np.int64], owned: NDArray[np.bool_], sign: Sign) -> None:
    rows = owned.any(axis=1)
    for position, character in enumerate(sign.text):
        middles = np.arange(GRID) * PATCH + PATCH / 2
        under = (middles >= sign.edges[position]) & (middles < sign.edges[position + 1])
        marked = owned & np.outer(rows, under)
        targets[marked, _COLUMN["character"]] = 1 + SIGN_CHARACTERS.index(character)
        targets[marked, _COLUMN["position"]] = position
