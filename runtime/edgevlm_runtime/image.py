"""Pictures in, vision-graph inputs out: `load_image`, then `prepare`, by an `ImageSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevlm_runtime.errors import InputError
from edgevlm_runtime.images.geometry import (
    longest_edge_size,
    nearest_grid,
    shortest_edge_size,
    smart_grid,
    tiled_size,
)
from edgevlm_runtime.images.load import ImageSource, read_picture
from edgevlm_runtime.images.spec import (
    ConversionRules,
    FixedGeometry,
    ImageLayout,
    ImageSpec,
    NativeGeometry,
    TiledGeometry,
)
from edgevlm_runtime.images.tensor import patches, write_pixels

__all__ = [
    "ConversionRules",
    "Feed",
    "FixedGeometry",
    "ImageLayout",
    "ImageSource",
    "ImageSpec",
    "NativeGeometry",
    "PreparedImage",
    "TiledGeometry",
    "load_image",
    "prepare",
]

Feed = Mapping[str, NDArray[np.float32] | NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedImage:
    """One picture, ready for the vision graph.

    `feeds` has one entry per call of the vision graph, by input source: `pixels` float32
    [1, 3, H, W] for fixed and tiled pictures (the entries are slices of one array, in the order in
    which their tokens stand in the prompt), [patches, 3 * temporal * patch * patch] for native
    ones, which also have `grid` int64 [1, 3] (1, height, width). `note` says where the picture was
    not treated as its own size calls for, else it is None.
    """

    feeds: tuple[Feed, ...]
    layout: ImageLayout
    note: str | None = None

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the whole picture."""
        return self.layout.num_tokens


def load_image(source: ImageSource, spec: ImageSpec) -> Image.Image:
    """Decode a picture and convert it to RGB by the spec's rules, or raise `InputError`.

    A source is a path, encoded bytes, an array uint8 [H, W, 3] in RGB order, or a Pillow image.
    """
    return read_picture(source, spec.rules)


def prepare(image: Image.Image, spec: ImageSpec) -> PreparedImage:
    """Resize, cut and normalise an RGB picture, to the bit as the checkpoint's processor does."""
    if image.mode != "RGB":
        raise InputError(
            f"picture has mode {image.mode!r}, expected 'RGB'", hint="pass it through load_image"
        )
    if isinstance(spec.geometry, FixedGeometry):
        return _prepare_fixed(image, spec, spec.geometry)
    if isinstance(spec.geometry, TiledGeometry):
        return _prepare_tiled(image, spec, spec.geometry)
    return _prepare_native(image, spec, spec.geometry)


def _prepare_fixed(image: Image.Image, spec: ImageSpec, geometry: FixedGeometry) -> PreparedImage:
    if geometry.pad_colour is not None:
        image = _squared(image, geometry.pad_colour)
    if geometry.shortest_edge is not None:
        size = shortest_edge_size(image.height, image.width, geometry.shortest_edge)
        _check_resized(image, size, spec)
        image = _resized(image, size, spec)
    elif geometry.size is not None:
        image = _resized(image, geometry.size, spec)
    if geometry.crop is not None:
        image = _centre(image, *geometry.crop)
    return _prepared([image], spec, ImageLayout(tokens=spec.tokens))


def _prepare_tiled(image: Image.Image, spec: ImageSpec, geometry: TiledGeometry) -> PreparedImage:
    tile = geometry.tile
    size = longest_edge_size(image.height, image.width, geometry.longest_edge)
    image = _resized(image, size, spec)
    if geometry.split:
        image = _resized(image, tiled_size(image.height, image.width, tile), spec)
    whole = _resized(image, (tile, tile), spec)
    if not geometry.split or image.size == (tile, tile):
        return _prepared([whole], spec, ImageLayout(tokens=spec.tokens))
    rows, columns = image.height // tile, image.width // tile
    tiles = [
        image.crop((column * tile, row * tile, (column + 1) * tile, (row + 1) * tile))
        for row in range(rows)
        for column in range(columns)
    ]
    tokens = spec.tokens * (rows * columns + 1)
    return _prepared([*tiles, whole], spec, ImageLayout(tokens=tokens, tiles=(rows, columns)))


def _prepare_native(image: Image.Image, spec: ImageSpec, geometry: NativeGeometry) -> PreparedImage:
    wanted = smart_grid(image.height, image.width, geometry)
    grid = nearest_grid(wanted, geometry)
    note = None
    if grid != wanted:
        note = (
            f"a picture of {image.width} x {image.height} calls for {wanted[1]} x {wanted[0]} "
            f"patches, taken at {grid[1]} x {grid[0]}, the nearest that the bundle has"
        )
    height, width = grid[0] * geometry.patch, grid[1] * geometry.patch
    pixels = patches(
        _resized(image, (height, width), spec),
        spec,
        patch=geometry.patch,
        merge=geometry.merge,
        temporal=geometry.temporal_patch,
    )
    index = geometry.grids.index(grid)
    layout = ImageLayout(
        tokens=(spec.tokens[index],),
        grid=grid,
        token_grid=(grid[0] // geometry.merge, grid[1] // geometry.merge),
    )
    feed: Feed = {"pixels": pixels, "grid": np.array([[1, *grid]], np.int64)}
    return PreparedImage(feeds=(feed,), layout=_placed(layout, spec, index), note=note)


def _prepared(images: list[Image.Image], spec: ImageSpec, layout: ImageLayout) -> PreparedImage:
    """One feed per image, all of one size, as slices of one array."""
    pixels = np.empty((len(images), 3, images[0].height, images[0].width), np.float32)
    for image, out_CHW in zip(images, pixels, strict=True):
        write_pixels(image, out_CHW, spec)
    feeds = tuple({"pixels": pixels[i : i + 1]} for i in range(len(images)))
    return PreparedImage(feeds=feeds, layout=_placed(layout, spec, 0))


def _placed(layout: ImageLayout, spec: ImageSpec, index: int) -> ImageLayout:
    """The layout with the spec's offsets and span of that number."""
    offsets = None if spec.offsets is None else spec.offsets[index]
    span = None if spec.spans is None else spec.spans[index]
    return replace(layout, offsets=offsets, span=span)


def _resized(image: Image.Image, size: tuple[int, int], spec: ImageSpec) -> Image.Image:
    """The picture at `size` (height, width), itself where it has that size already."""
    height, width = size
    if (image.width, image.height) == (width, height):
        return image
    return image.resize((width, height), Image.Resampling[spec.resample.upper()])


def _check_resized(image: Image.Image, size: tuple[int, int], spec: ImageSpec) -> None:
    """Refuse a sliver: its longer side grows with its shorter one."""
    height, width = size
    if height * width > spec.rules.max_pixels:
        raise InputError(
            f"picture is {image.width} x {image.height}, resized it would be {width} x {height}, "
            f"{width * height:,} pixels of at most {spec.rules.max_pixels:,}",
            hint="cut it to a shape nearer to a square",
        )


def _squared(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _centre(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre of the picture, in black where the picture is smaller."""
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))
