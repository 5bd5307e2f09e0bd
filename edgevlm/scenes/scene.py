"""A scene: the facts of one picture, drawn up from a seed before anything is painted."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import ImageFont

from edgevlm.scenes.words import BOX_UNIT, COLOURS, REGIONS, SHAPES, SIDE, SIGN_CHARACTERS
from edgevlm_runtime.errors import InputError

SPLITS = {
    "train": range(0, 1_000_000_000),
    "calibration": range(1_000_000_000, 1_100_000_000),
    "evaluation": range(1_100_000_000, 1_200_000_000),
}

_COUNTS = (1, 2, 3, 4, 5, 6)
_COUNT_WEIGHTS = (0.18, 0.22, 0.22, 0.16, 0.12, 0.10)
_SMALL_SIDES = (14, 16, 18)
_LARGE_SIDES = (24, 26, 28, 30)
_SIGN_SHARE = 0.4
_MOST_BESIDE_SIGN = 4
# No centre comes closer than this to a line between two regions.
_REGION_MARGIN = 3
_REGION_SIDE = SIDE // 3
_GAP = 2

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One object: a coloured shape that fills a square of pixels."""

    colour: str
    shape: str
    left: int
    top: int
    side: int

    @property
    def size(self) -> str:
        """Small or large, by the side."""
        return "small" if self.side <= _SMALL_SIDES[-1] else "large"

    @property
    def box(self) -> Box:
        """Left, top, right and bottom edges in pixels."""
        return (self.left, self.top, self.left + self.side, self.top + self.side)

    @property
    def region(self) -> str:
        """The region of the centre."""
        return region_of(self.box)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """A plate with text; `edges` are the pixel columns between its characters."""

    text: str
    font_size: int
    dark: bool
    box: Box
    edges: tuple[float, ...]

    @property
    def region(self) -> str:
        """The region of the centre."""
        return region_of(self.box)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that can be asked about one picture, objects in reading order."""

    seed: int
    things: tuple[Thing, ...]
    sign: Sign | None


def make_scene(seed: int) -> Scene:
    """Draw up the scene of a seed; the same seed gives the same scene."""
    rng = random.Random(seed)
    num_things = rng.choices(_COUNTS, _COUNT_WEIGHTS)[0]
    sign = None
    # Signs go to the sparser pictures only, so those carry more than their share.
    if num_things <= _MOST_BESIDE_SIGN and rng.random() < _SIGN_SHARE / 0.78:
        sign = _make_sign(rng)
    things = _place_things(rng, num_things, sign)
    things.sort(key=lambda thing: REGIONS.index(thing.region))
    return Scene(seed=seed, things=tuple(things), sign=sign)


def spare_signs(scene: Scene) -> tuple[Sign, ...]:
    """More signs that fit into a scene's gaps; stage 1 of training practises reading on them."""
    rng = random.Random(f"signs {scene.seed}")
    taken = [thing.box for thing in scene.things]
    if scene.sign is not None:
        taken.append(scene.sign.box)
    signs: list[Sign] = []
    for _ in range(10):
        sign = _make_sign(rng)
        if _fits(sign.box, taken):
            signs.append(sign)
            taken.append(sign.box)
    return tuple(signs)


def check_split(split: str, seed: int) -> int:
    """Return the seed if it belongs to the split, so that no picture is in two splits."""
    if split not in SPLITS:
        raise InputError(
            f"{split!r} is not a split", hint=f"use one of {', '.join(sorted(SPLITS))}"
        )
    seeds = SPLITS[split]
    if seed not in seeds:
        raise InputError(
            f"seed {seed} is outside the {split} split, {seeds.start} to {seeds.stop - 1}",
            hint="draw seeds from edgevlm.scenes.SPLITS",
        )
    return seed


def region_of(box: Box) -> str:
    """The region that holds the centre of a pixel box."""
    column = (box[0] + box[2]) // 2 // _REGION_SIDE
    row = (box[1] + box[3]) // 2 // _REGION_SIDE
    return REGIONS[3 * row + column]


def box_cells(box: Box) -> Box:
    """A pixel box as the first and last cell, both included, of the 32 x 32 answer grid."""
    left, top, right, bottom = box
    return (
        left // BOX_UNIT,
        top // BOX_UNIT,
        (right - 1) // BOX_UNIT,
        (bottom - 1) // BOX_UNIT,
    )


@lru_cache(maxsize=64)
def sign_font(size: int) -> ImageFont.FreeTypeFont:
    """The font of the signs, the one that comes with Pillow."""
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise InputError("pillow was built without FreeType", hint="install a pillow wheel")
    return font


def _make_sign(rng: random.Random) -> Sign:
    length = rng.choice((2, 3, 4))
    text = ""
    while len(text) < length:
        character = rng.choice(SIGN_CHARACTERS)
        # Two digits in a row would read as one number, and as one token.
        if not (text and text[-1].isdigit() and character.isdigit()):
            text += character
    font_size = rng.randint(18, 22)
    font = sign_font(2 * font_size)
    widths = [font.getlength(text[:end]) / 2 for end in range(length + 1)]
    width = 2 * round(widths[-1] / 2) + 8
    height = 2 * ((font_size + 8) // 2)
    while True:
        centre_x = rng.randint(width // 2 + 1, SIDE - 1 - width // 2)
        centre_y = rng.randint(height // 2 + 1, SIDE - 1 - height // 2)
        if _clear_of_lines(centre_x) and _clear_of_lines(centre_y):
            break
    left, top = centre_x - width // 2, centre_y - height // 2
    return Sign(
        text=text,
        font_size=font_size,
        dark=rng.random() < 0.4,
        box=(left, top, left + width, top + height),
        edges=tuple(centre_x - widths[-1] / 2 + edge for edge in widths),
    )


def _place_things(rng: random.Random, count: int, sign: Sign | None) -> list[Thing]:
    free = [region for region in range(9) if sign is None or REGIONS[region] != sign.region]
    taken = [] if sign is None else [sign.box]
    large_share = 0.6 if count <= 2 else 0.45 if count <= 4 else 0.35
    sides = sorted(
        (
            rng.choice(_LARGE_SIDES if rng.random() < large_share else _SMALL_SIDES)
            for _ in range(count)
        ),
        reverse=True,
    )
    things: list[Thing] = []
    for side in sides:
        corner = _find_corner(rng, side, free, taken)
        if corner is None:
            side = rng.choice(_SMALL_SIDES)
            corner = _find_corner(rng, side, free, taken)
        if corner is None:
            continue
        colour, shape = _pick_look(rng, things)
        thing = Thing(colour=colour, shape=shape, left=corner[0], top=corner[1], side=side)
        things.append(thing)
        taken.append(thing.box)
        free.remove(REGIONS.index(thing.region))
    return things


def _pick_look(rng: random.Random, things: list[Thing]) -> tuple[str, str]:
    """Colour and shape, each now and then repeated so that counts above one occur."""
    colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
    if things and rng.random() < 0.3:
        colour = rng.choice(things).colour
    if things and rng.random() < 0.3:
        shape = rng.choice(things).shape
    return colour, shape


def _find_corner(
    rng: random.Random, side: int, free: list[int], taken: list[Box]
) -> tuple[int, int] | None:
    half = side // 2
    for region in rng.sample(free, len(free)):
        row, column = divmod(region, 3)
        for _ in range(8):
            left = _pick_centre(rng, column, half) - half
            top = _pick_centre(rng, row, half) - half
            if _fits((left, top, left + side, top + side), taken):
                return left, top
    return None


def _fits(box: Box, taken: list[Box]) -> bool:
    """Whether a box keeps its distance from all others."""
    return all(
        box[0] >= other[2] + _GAP
        or box[2] + _GAP <= other[0]
        or box[1] >= other[3] + _GAP
        or box[3] + _GAP <= other[1]
        for other in taken
    )


def _pick_centre(rng: random.Random, cell: int, half: int) -> int:
    low = max(cell * _REGION_SIDE + _REGION_MARGIN, half + 1)
    high = min((cell + 1) * _REGION_SIDE - _REGION_MARGIN, SIDE - 1 - half)
    return rng.randint(low, high)


def _clear_of_lines(centre: int) -> bool:
    return all(abs(centre - line) >= _REGION_MARGIN for line in (32, 64))
