"""Preprocessing is transformers' own, to the bit: the Pillow processors are the referee."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from edgevlm_runtime.errors import InputError
from edgevlm_runtime.image import (
    FixedGeometry,
    ImageSpec,
    NativeGeometry,
    TiledGeometry,
    load_image,
    prepare,
)

CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
HALF = (0.5, 0.5, 0.5)
SIZES = (  # width, height
    (1, 1),
    (2, 3),
    (17, 17),
    (64, 64),
    (64, 48),
    (48, 64),
    (63, 65),
    (101, 7),
    (7, 101),
    (333, 250),
    (224, 224),
    (225, 224),
)
SLIVERS = ((20000, 1), (1, 20000), (3000, 2))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def fixed(geometry: FixedGeometry, resample: str = "bicubic") -> ImageSpec:
    return ImageSpec(
        geometry=geometry,
        resample=resample,
        rescale=1 / 255,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        tokens=(4,),
    )


def tiled(longest_edge: int, tile: int, *, split: bool) -> ImageSpec:
    return ImageSpec(
        geometry=TiledGeometry(longest_edge=longest_edge, tile=tile, split=split),
        resample="lanczos",
        rescale=1 / 255,
        mean=HALF,
        std=HALF,
        tokens=(4,),
    )


def native(*grids: tuple[int, int], min_pixels: int = 56 * 56, max_pixels: int = 784 * 64):
    return ImageSpec(
        geometry=NativeGeometry(
            patch=14,
            merge=2,
            temporal_patch=2,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            grids=grids,
        ),
        resample="bicubic",
        rescale=1 / 255,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        tokens=tuple(height * width // 4 for height, width in grids),
    )


def stacked(image: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    prepared = prepare(load_image(image, spec), spec)
    return np.concatenate([np.asarray(feed["pixels"], np.float32) for feed in prepared.feeds])


def same_bits(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> bool:
    return (
        ours.dtype == theirs.dtype == np.float32
        and ours.shape == theirs.shape
        and ours.tobytes() == np.ascontiguousarray(theirs).tobytes()
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("edge", [32, 33])
def test_clip_is_the_referees_to_the_bit(size: tuple[int, int], edge: int) -> None:
    referee = CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": 32, "width": 32}
    )
    spec = fixed(FixedGeometry(shortest_edge=edge, crop=(32, 32)))
    image = picture(*size)
    assert same_bits(stacked(image, spec), referee(image, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", [(30, 40), (90, 40), (31, 33), (200, 201)])
def test_centre_crop_pads_where_the_picture_is_smaller(
    size: tuple[int, int], crop: tuple[int, int]
) -> None:
    height, width = crop
    referee = CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": height, "width": width}
    )
    spec = fixed(FixedGeometry(shortest_edge=48, crop=crop))
    image = picture(*size)
    assert same_bits(stacked(image, spec), referee(image, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("size", SIZES + SLIVERS)
@pytest.mark.parametrize("resample", ["nearest", "lanczos", "bilinear", "bicubic"])
def test_siglip_is_the_referees_to_the_bit(size: tuple[int, int], resample: str) -> None:
    referee = SiglipImageProcessorPil(
        size={"height": 48, "width": 40},
        resample=Image.Resampling[resample.upper()],
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    spec = fixed(FixedGeometry(size=(48, 40)), resample)
    image = picture(*size)
    assert same_bits(stacked(image, spec), referee(image, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("size", SIZES)
def test_llava_pads_to_a_square_first(size: tuple[int, int]) -> None:
    referee = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}
    )
    colour = tuple(int(value * 255) for value in CLIP_MEAN)
    spec = fixed(FixedGeometry(pad_colour=colour, shortest_edge=40, crop=(40, 40)))
    image = picture(*size)
    theirs = np.stack(referee(image)["pixel_values"])
    assert same_bits(stacked(image, spec), theirs)


@pytest.mark.parametrize("referee_class", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
@pytest.mark.parametrize("size", SIZES + SLIVERS)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("longest_edge", "tile"), [(96, 32), (100, 32), (32, 32), (60, 50)])
def test_tiles_are_the_referees_to_the_bit(
    referee_class: type, size: tuple[int, int], split: bool, longest_edge: int, tile: int
) -> None:
    referee = referee_class(
        size={"longest_edge": longest_edge},
        max_image_size={"longest_edge": tile},
        do_image_splitting=split,
    )
    image = picture(*size)
    theirs = referee([[image]], return_row_col_info=True, return_tensors="np")
    spec = tiled(longest_edge, tile, split=split)
    assert same_bits(stacked(image, spec), theirs["pixel_values"][0])
    layout = prepare(image, spec).layout
    assert layout.tiles == (theirs["rows"][0][0], theirs["cols"][0][0])
    assert layout.num_tokens == 4 * theirs["pixel_values"].shape[1]


@pytest.mark.parametrize("size", [(4100, 300), (300, 4100), (5000, 2)])
def test_tiles_of_a_resize_above_the_referees_bound(size: tuple[int, int]) -> None:
    referee = Idefics3ImageProcessorPil(
        size={"longest_edge": 4400}, max_image_size={"longest_edge": 1024}
    )
    image = picture(*size)
    theirs = referee([[image]], return_tensors="np")["pixel_values"][0]
    assert same_bits(stacked(image, tiled(4400, 1024, split=True)), theirs)


NATIVE_SIZES = ((1, 1), (2, 3), (28, 28), (100, 75), (75, 100), (333, 250), (400, 2), (640, 480))


@pytest.mark.parametrize("size", NATIVE_SIZES)
def test_native_patches_are_the_referees_to_the_bit(size: tuple[int, int]) -> None:
    referee = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 784 * 64})
    image = picture(*size)
    theirs = referee(image, return_tensors="np")
    grid = tuple(int(side) for side in theirs["image_grid_thw"][0][1:])
    spec = native((2, 2), grid, (4, 60))
    prepared = prepare(load_image(image, spec), spec)
    feed = prepared.feeds[0]
    assert same_bits(np.asarray(feed["pixels"]), theirs["pixel_values"])
    assert feed["grid"].tolist() == theirs["image_grid_thw"].tolist()
    assert prepared.layout.grid == grid
    assert prepared.num_tokens == math.prod(grid) // 4
    assert prepared.note is None


def test_native_takes_the_nearest_grid_and_says_so() -> None:
    spec = native((4, 4), (8, 16), (16, 8))
    prepared = prepare(picture(280, 112), spec)
    assert prepared.note == (
        "a picture of 280 x 112 calls for 20 x 8 patches, taken at 16 x 8, "
        "the nearest that the bundle has"
    )
    assert prepared.layout.grid == (8, 16)
    assert prepared.layout.token_grid == (4, 8)
    assert prepared.feeds[0]["pixels"].shape == (8 * 16, 3 * 2 * 14 * 14)
    resized = picture(280, 112).resize((16 * 14, 8 * 14), Image.Resampling.BICUBIC)
    assert same_bits(
        np.asarray(prepared.feeds[0]["pixels"]),
        np.asarray(prepare(resized, spec).feeds[0]["pixels"]),
    )


@pytest.mark.parametrize(
    ("rescale", "mean"),
    list(itertools.product([None, 1 / 255, 0.00784313725], [None, HALF])),
)
def test_every_value_of_a_byte_is_the_referees(
    rescale: float | None, mean: tuple[float, float, float] | None
) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values, values[::-1], values.T], axis=-1))
    referee = SiglipImageProcessorPil(
        do_resize=False,
        do_rescale=rescale is not None,
        rescale_factor=rescale or 1.0,
        do_normalize=mean is not None,
        image_mean=mean or HALF,
        image_std=CLIP_STD,
    )
    spec = ImageSpec(
        geometry=FixedGeometry(crop=(16, 16)),
        resample="bicubic",
        rescale=rescale,
        mean=mean,
        std=CLIP_STD if mean else None,
        tokens=(1,),
    )
    theirs = referee(image, return_tensors="np")["pixel_values"].astype(np.float32)
    assert same_bits(stacked(image, spec), theirs)


def test_tiles_are_slices_of_one_array() -> None:
    feeds = prepare(picture(64, 32), tiled(64, 32, split=True)).feeds
    assert [feed["pixels"].shape for feed in feeds] == [(1, 3, 32, 32)] * 3
    assert all(feed["pixels"].base is feeds[0]["pixels"].base for feed in feeds)


def test_a_sliver_that_would_grow_without_bound_is_refused() -> None:
    spec = fixed(FixedGeometry(shortest_edge=336, crop=(336, 336)))
    with pytest.raises(InputError) as caught:
        prepare(picture(20000, 1), spec)
    assert str(caught.value) == (
        "picture is 20000 x 1, resized it would be 6720000 x 336, "
        "2,257,920,000 pixels of at most 25,000,000\n  hint: cut it to a shape nearer to a square"
    )


def test_a_native_sliver_is_refused_as_by_the_referee() -> None:
    with pytest.raises(InputError) as caught:
        prepare(picture(201, 1), native((4, 4)))
    assert str(caught.value) == (
        "picture is 201 x 1, one side 201 times the other, at most 200 times is read"
    )
    with pytest.raises(ValueError, match="absolute aspect ratio must be smaller than 200, got 201"):
        Qwen2VLImageProcessorPil()(picture(201, 1))


def test_prepare_wants_rgb() -> None:
    with pytest.raises(InputError) as caught:
        prepare(Image.new("L", (4, 4)), native((4, 4)))
    assert str(caught.value) == (
        "picture has mode 'L', expected 'RGB'\n  hint: pass it through load_image"
    )
