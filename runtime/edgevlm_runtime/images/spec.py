"""What a bundle says about its pictures: geometry, numbers, and the rules of conversion.

A spec is plain data. It stands in `manifest.json` under `image`, is made by the compiler from the
checkpoint's processor files, and is all that the runtime knows about preprocessing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


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
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP")
    max_pixels: int = 25_000_000
    max_bytes: int = 100_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpec:
    """The whole of a bundle's preprocessing.

    `rescale`, `mean` and `std` are applied in that order in float32 (the product in float64), each
    left out where it is None. `tokens` is the number of visual tokens that one call of the vision
    graph gives: one number for fixed and tiled pictures, one per grid for native ones.
    """

    geometry: Geometry
    resample: str
    rescale: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    tokens: tuple[int, ...]
    rules: ConversionRules = field(default_factory=ConversionRules)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest; `geometry` carries its kind."""
        data = asdict(self)
        data["geometry"] = {"kind": self.geometry.kind, **data["geometry"]}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageSpec:
        """Read the manifest's `image`; what is unknown, missing or wrong is a `BundleError`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLayout:
    """How the visual tokens of one picture lie, for the prompt and for positions.

    `tokens` counts them per call of the vision graph, in order. `tiles` (rows, columns) is (0, 0)
    where the picture was not cut. `grid` is the patch grid (height, width) of a native picture,
    which names the vision graph to run; `token_grid` is the same after merging.
    """

    tokens: tuple[int, ...]
    tiles: tuple[int, int] = (0, 0)
    grid: tuple[int, int] | None = None
    token_grid: tuple[int, int] | None = None

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the whole picture."""
        return sum(self.tokens)
