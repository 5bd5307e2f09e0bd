"""Pictures in, vision-graph inputs out: `load_image`, then `prepare`, by the bundle's `ImageSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevlm_runtime.images.spec import (
    ConversionRules,
    FixedGeometry,
    ImageLayout,
    ImageSpec,
    NativeGeometry,
    TiledGeometry,
)

__all__ = [
    "ConversionRules",
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

ImageSource = str | Path | bytes | NDArray[np.uint8] | Image.Image


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedImage:
    """One picture, ready for the vision graph.

    `feeds` has one entry per call of the vision graph, by input source: `pixels` float32
    [1, 3, H, W] for fixed and tiled pictures (the entries are slices of one array, in the order in
    which their tokens stand in the prompt), [patches, 3 * temporal * patch * patch] for native
    ones, which also have `grid` int64 [1, 3] (1, height, width). `note` says where the picture was
    not treated as its own size calls for, else it is None.
    """

    feeds: tuple[Mapping[str, NDArray[np.float32] | NDArray[np.int64]], ...]
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
    raise NotImplementedError


def prepare(image: Image.Image, spec: ImageSpec) -> PreparedImage:
    """Resize, cut and normalise an RGB picture, to the bit as the checkpoint's own processor does."""
    raise NotImplementedError
