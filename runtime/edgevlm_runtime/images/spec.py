"""What a bundle says about its pictures: geometry, numbers, and the rules of conversion.

A spec is plain data. It stands in `manifest.json` under `image`, is made by the compiler from the
checkpoint's processor files, and is all that the runtime knows about preprocessing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, get_type_hints

from edgevlm_runtime import structure
from edgevlm_runtime.errors import BundleError


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedGeometry:
    """Every picture becomes one tensor of one size (CLIP, SigLIP).

    `pad_colour` first pads to a square around the centre. `shortest_edge` resizes so that the
    shorter side has that length, `size` (height, width) resizes to exactly that; at most one of the
    two is given. `crop` (height, width) then cuts the centre, padding with black where the picture
    is smaller; it may be left out where `size` says the size of the tensor.
    """

    kind: ClassVar[str] = "fixed"

    pad_colour: tuple[int, int, int] | None = None
    shortest_edge: int | None = None
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the tensor."""
        output = self.crop or self.size
        assert output is not None, "checked when the spec was read"
        return output


@dataclass(frozen=True, kw_only=True, slots=True)
class TiledGeometry:
    """A picture becomes square tiles and one small global picture (Idefics3, SmolVLM).

    The picture is resized so that the longer side has `longest_edge`, then to multiples of `tile`,
    then cut into rows and columns of tiles; the whole, resized to one tile, comes last. With
    `split` false there is the global picture alone.
    """

    kind: ClassVar[str] = "tiled"

    longest_edge: int
    tile: int
    split: bool = True

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of one tile."""
        return self.tile, self.tile


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeGeometry:
    """A picture keeps its shape, as rows of flattened patches (Qwen2-VL, Qwen2.5-VL).

    `grids` (height, width, in patches) are the sizes that vision graphs exist for. A picture is
    resized to the grid that its own size calls for where that is one of them, else to the nearest
    one, which `PreparedImage.note` then says.
    """

    kind: ClassVar[str] = "native"

    patch: int
    merge: int
    temporal_patch: int
    min_pixels: int
    max_pixels: int
    grids: tuple[tuple[int, int], ...]


Geometry = FixedGeometry | TiledGeometry | NativeGeometry
GEOMETRIES: dict[str, type[FixedGeometry | TiledGeometry | NativeGeometry]] = {
    geometry.kind: geometry for geometry in (FixedGeometry, TiledGeometry, NativeGeometry)
}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionRules:
    """How a picture that is not plain 8-bit RGB becomes one, and what is refused.

    Alpha and palette transparency are composited on `background`. 16-bit grey is divided by
    `sixteen_bit_divisor` (257 maps 65535 to 255), rounding to nearest. `exif_transpose` turns the
    picture the way its EXIF orientation says. Grey, palette and CMYK go through Pillow's `convert`.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    sixteen_bit_divisor: int = 257
    exif_transpose: bool = True
    formats: tuple[str, ...] = FORMATS
    max_pixels: int = 25_000_000
    max_bytes: int = 100_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpec:
    """The whole of a bundle's preprocessing.

    `rescale`, `mean` and `std` are applied in that order in float32 (the product in float64), each
    left out where it is None. `tokens` is the number of visual tokens that one call of the vision
    graph gives: one number for fixed and tiled pictures, one per grid for native ones.

    `offsets` and `spans`, where they are given, have as many entries. Of visual tokens of which the
    first row begins at position p, token i stands at p + offsets[i], a number for each axis of the
    rotary embedding, and what follows begins at p + span; without them as the positions of
    `TextSpec` say.
    """

    geometry: Geometry
    resample: str
    rescale: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    tokens: tuple[int, ...]
    rules: ConversionRules = field(default_factory=ConversionRules)
    offsets: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    spans: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest; `geometry` carries its kind."""
        data: dict[str, Any] = structure.to_json(self)
        data["geometry"] = {"kind": self.geometry.kind, **data["geometry"]}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageSpec:
        """Read the manifest's `image`; what is unknown, missing or wrong is a `BundleError`."""
        kinds = get_type_hints(cls)
        values: dict[str, Any] = {}
        for name, value in data.items():
            if name not in kinds:
                raise BundleError(f"{_PLACE}: unknown key {name!r}", hint=_RECOMPILE)
            place = f"{_PLACE}.{name}"
            if name == "geometry":
                values[name] = _geometry(value, place)
            else:
                values[name] = structure.from_json(kinds[name], value, place)
        for known in fields(cls):
            required = known.default is MISSING and known.default_factory is MISSING
            if required and known.name not in values:
                raise BundleError(f"{_PLACE}: missing key {known.name!r}", hint=_RECOMPILE)
        spec = cls(**values)
        _check(spec)
        return spec


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLayout:
    """How the visual tokens of one picture lie, for the prompt and for positions.

    `tokens` counts them per call of the vision graph, in order. `tiles` (rows, columns) is (0, 0)
    where the picture was not cut. `grid` is the patch grid (height, width) of a native picture,
    which names the vision graph to run; `token_grid` is the same after merging. `offsets` and
    `span` are those of `ImageSpec` for the tokens of each call.
    """

    tokens: tuple[int, ...]
    tiles: tuple[int, int] = (0, 0)
    grid: tuple[int, int] | None = None
    token_grid: tuple[int, int] | None = None
    offsets: tuple[tuple[float, ...], ...] | None = None
    span: float | None = None

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the whole picture."""
        return sum(self.tokens)


_PLACE = "manifest.json: image"
_RECOMPILE = "compile the bundle again, a manifest is not edited by hand"


def _geometry(data: Any, place: str) -> Geometry:
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if kind not in GEOMETRIES:
        known = ", ".join(repr(name) for name in GEOMETRIES)
        raise BundleError(f"{place}.kind: expected one of {known}, got {kind!r}", hint=_RECOMPILE)
    rest = {name: value for name, value in data.items() if name != "kind"}
    return structure.from_json(GEOMETRIES[kind], rest, place)


def _check(spec: ImageSpec) -> None:
    """Refuse values that the types allow and that mean nothing."""
    for place, problem in _problems(spec):
        raise BundleError(f"{_PLACE}.{place}: {problem}", hint=_RECOMPILE)


def _problems(spec: ImageSpec) -> Iterator[tuple[str, str]]:
    geometry, rules = spec.geometry, spec.rules
    num_tokens = 1
    if isinstance(geometry, FixedGeometry):
        edge = 1 if geometry.shortest_edge is None else geometry.shortest_edge
        sizes: tuple[int, ...] = (edge, *(geometry.size or ()), *(geometry.crop or ()))
        if geometry.shortest_edge is not None and geometry.size is not None:
            yield "geometry", "shortest_edge and size exclude each other"
        if geometry.size is None and geometry.crop is None:
            yield "geometry", "the size of the tensor depends on the picture"
    elif isinstance(geometry, TiledGeometry):
        sizes = (geometry.longest_edge, geometry.tile)
    else:
        sizes = (geometry.patch, geometry.merge, geometry.temporal_patch, geometry.min_pixels)
        sizes += tuple(side for grid in geometry.grids for side in grid)
        num_tokens = len(geometry.grids)
        if not geometry.grids:
            yield "geometry.grids", "expected at least one"
        if geometry.max_pixels < geometry.min_pixels:
            yield "geometry.max_pixels", f"{geometry.max_pixels} is below min_pixels"
        for grid in geometry.grids:
            if any(side % max(geometry.merge, 1) for side in grid):
                yield "geometry.grids", f"{list(grid)} is not made of squares of {geometry.merge}"
    if min(sizes) < 1:
        yield "geometry", f"{min(sizes)} is not a size"
    if spec.resample not in RESAMPLES:
        known = ", ".join(repr(name) for name in RESAMPLES)
        yield "resample", f"expected one of {known}, got {spec.resample!r}"
    if (spec.mean is None) != (spec.std is None) or 0 in (spec.std or ()):
        yield "std", f"{spec.std} does not go with mean {spec.mean}"
    if len(spec.tokens) != num_tokens or min(spec.tokens) < 1:
        yield "tokens", f"expected {num_tokens} positive numbers, got {list(spec.tokens)}"
    yield from _problems_of_positions(spec)
    if not all(0 <= value <= 255 for value in rules.background):
        yield "rules.background", f"{list(rules.background)} is not a colour"
    if min(rules.sixteen_bit_divisor, rules.max_pixels, rules.max_bytes) < 1:
        yield "rules", "the divisor and the bounds must be positive"
    if not rules.formats or set(rules.formats) - set(FORMATS):
        known = ", ".join(repr(name) for name in FORMATS)
        yield "rules.formats", f"expected some of {known}, got {list(rules.formats)}"


def _problems_of_positions(spec: ImageSpec) -> Iterator[tuple[str, str]]:
    if spec.offsets is not None:
        counts = [len(offsets) for offsets in spec.offsets]
        axes = {len(row) for offsets in spec.offsets for row in offsets}
        if counts != list(spec.tokens):
            yield "offsets", f"expected a row for each of {list(spec.tokens)} tokens, got {counts}"
        if len(axes) > 1 or 0 in axes:
            yield "offsets", f"expected rows of one length, got {sorted(axes)}"
        numbers = [number for offsets in spec.offsets for row in offsets for number in row]
        if not all(map(math.isfinite, numbers)):
            yield "offsets", "a number is not finite"
    if spec.spans is not None and (
        len(spec.spans) != len(spec.tokens) or not all(0 < span < math.inf for span in spec.spans)
    ):
        yield "spans", f"expected {len(spec.tokens)} positive numbers, got {list(spec.spans)}"
