"""Paints a scene: 96 x 96 RGB, drawn at twice the size and reduced."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from edgevlm.scenes.scene import Scene, Sign, Thing, sign_font
from edgevlm.scenes.words import SIDE

_PAINT = {
    "red": (212, 44, 44),
    "orange": (240, 138, 30),
    "yellow": (238, 220, 60),
    "green": (58, 168, 66),
    "cyan": (72, 206, 216),
    "blue": (52, 84, 222),
    "purple": (152, 66, 190),
    "white": (240, 240, 240),
}
_JITTER = 12
_NOISE = 6
_SCALE = 2


def draw_scene(scene: Scene, spare: tuple[Sign, ...] = ()) -> Image.Image:
    """Paint a scene, with spare signs if there are any; the same scene gives the same pixels."""
    # Text, so that paint and layout never share a random stream.
    rng = random.Random(f"paint {scene.seed}")
    shade = rng.randint(40, 96)
    ground = tuple(shade + rng.randint(-14, 14) for _ in range(3))
    image = Image.new("RGB", (SIDE * _SCALE, SIDE * _SCALE), ground)
    canvas = ImageDraw.Draw(image)
    _draw_clutter(canvas, rng, ground)
    for thing in scene.things:
        paint = tuple(
            max(0, min(255, level + rng.randint(-_JITTER, _JITTER)))
            for level in _PAINT[thing.colour]
        )
        _draw_thing(canvas, thing, paint)
    for sign in _signs(scene, spare):
        _draw_sign(canvas, sign, rng)
    noise = np.random.default_rng(scene.seed).integers(
        -_NOISE, _NOISE, (SIDE, SIDE, 3), dtype=np.int16, endpoint=True
    )
    pixels = np.asarray(image.reduce(_SCALE)) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _signs(scene: Scene, spare: tuple[Sign, ...]) -> tuple[Sign, ...]:
    return spare if scene.sign is None else (scene.sign, *spare)


def _draw_clutter(canvas: ImageDraw.ImageDraw, rng: random.Random, ground: tuple[int, ...]) -> None:
    end = SIDE * _SCALE
    for _ in range(rng.randint(1, 4)):
        tone = rng.choice((-18, 18, 28))
        line = (rng.randrange(end), rng.randrange(end), rng.randrange(end), rng.randrange(end))
        canvas.line(line, tuple(max(0, level + tone) for level in ground), rng.randint(1, 3))
    for _ in range(rng.randint(2, 8)):
        x, y, radius = rng.randrange(end), rng.randrange(end), rng.randint(1, 3)
        tone = rng.choice((-25, 30, 45))
        canvas.ellipse(
            (x - radius, y - radius, x + radius, y + radius),
            tuple(max(0, level + tone) for level in ground),
        )


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, paint: tuple[int, ...]) -> None:
    left, top, right, bottom = (_SCALE * edge for edge in thing.box)
    if thing.shape == "circle":
        canvas.ellipse((left, top, right - 1, bottom - 1), paint)
        return
    side = right - left - 1
    canvas.polygon([(left + x * side, top + y * side) for x, y in _OUTLINES[thing.shape]], paint)


def _draw_sign(canvas: ImageDraw.ImageDraw, sign: Sign, rng: random.Random) -> None:
    left, top, right, bottom = (_SCALE * edge for edge in sign.box)
    wobble = rng.randint(-10, 10)
    plate, ink = (226 + wobble, 216 + wobble, 182 + wobble), (32, 30, 40)
    if sign.dark:
        plate, ink = (30 + wobble, 26 + wobble, 44 + wobble), (236, 232, 214)
    canvas.rectangle((left, top, right - 1, bottom - 1), plate, ink, 2)
    canvas.text(
        (_SCALE * sign.edges[0], (top + bottom) / 2),
        sign.text,
        ink,
        sign_font(_SCALE * sign.font_size),
        anchor="lm",
    )


def _star() -> tuple[tuple[float, float], ...]:
    """A five-pointed star stretched to fill the unit square."""
    points = []
    for corner in range(10):
        reach = 1.0 if corner % 2 == 0 else 0.42
        angle = math.pi * corner / 5
        points.append((reach * math.sin(angle), -reach * math.cos(angle)))
    wide = max(x for x, _ in points)
    high, low = min(y for _, y in points), max(y for _, y in points)
    return tuple(((x + wide) / (2 * wide), (y - high) / (low - high)) for x, y in points)


_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "star": _star(),
    "cross": (
        (0.34, 0),
        (0.66, 0),
        (0.66, 0.34),
        (1, 0.34),
        (1, 0.66),
        (0.66, 0.66),
        (0.66, 1),
        (0.34, 1),
        (0.34, 0.66),
        (0, 0.66),
        (0, 0.34),
        (0.34, 0.34),
    ),
}
