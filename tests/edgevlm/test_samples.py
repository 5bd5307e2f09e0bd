"""Samples: every vision grid is exercised, whatever shapes the pictures have."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edgevlm.samples import Sample, cover_grids
from edgevlm_runtime.images.geometry import nearest_grid, smart_grid
from edgevlm_runtime.images.spec import FixedGeometry, NativeGeometry

GEOMETRY = NativeGeometry(
    patch=8,
    merge=2,
    temporal_patch=2,
    min_pixels=16 * 16,
    max_pixels=256 * 256,
    grids=((16, 16), (12, 20), (20, 12)),
)


def sample(*sizes: tuple[int, int]) -> Sample:
    """A sample with pictures of these sizes (width, height), each of two halves."""
    pixels = [np.zeros((height, width, 3), np.uint8) for width, height in sizes]
    for picture in pixels:
        picture[:, picture.shape[1] // 2 :] = 255
    images = tuple(Image.fromarray(picture) for picture in pixels)
    return Sample(images=images, messages=(), answers=("a",), task="answer")


def grids(samples: list[Sample]) -> list[tuple[int, int]]:
    return [
        nearest_grid(smart_grid(image.height, image.width, GEOMETRY), GEOMETRY)
        for entry in samples
        for image in entry.images
    ]


def test_a_sample_is_stretched_to_every_grid_that_none_takes() -> None:
    samples = [sample((128, 128), (128, 128)), sample((96, 96))]
    covered = cover_grids(samples, GEOMETRY)
    assert covered[:2] == samples
    assert grids(covered) == [(16, 16)] * 3 + [(12, 20), (20, 12)]
    wide = covered[2].images[0]
    assert wide.size == (160, 96)
    # The picture is stretched, not cut: its halves stay halves.
    assert np.asarray(wide)[:, [10, 150], 0].tolist() == [[0, 255]] * 96
    assert covered[2].answers == ("a",)


@pytest.mark.parametrize(
    "geometry", [GEOMETRY, FixedGeometry(size=(96, 96))], ids=["native", "fixed"]
)
def test_nothing_is_added_where_nothing_is_missing(
    geometry: NativeGeometry | FixedGeometry,
) -> None:
    samples = [sample((128, 128)), sample((160, 96)), sample((96, 160))]
    assert cover_grids(samples, geometry) == samples
