"""Image specs from processor files: the same tensor as the processor that the files describe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from edgevlm.errors import ModelError
from edgevlm.families.image_spec import ImageChoices, image_spec
from edgevlm_runtime.image import (
    FixedGeometry,
    ImageSpec,
    NativeGeometry,
    TiledGeometry,
    load_image,
    prepare,
)

CLIP = {"image_processor_type": "CLIPImageProcessor"}
TILED = {
    "image_processor_type": "Idefics3ImageProcessor",
    "size": {"longest_edge": 96},
    "max_image_size": {"longest_edge": 32},
}
NATIVE = {"image_processor_type": "Qwen2VLImageProcessor"}
REPOSITORY = "\n  hint: take preprocessor_config.json from the checkpoint's own repository"


def files(config: dict[str, Any], processor: dict[str, Any] | None = None) -> dict[str, bytes]:
    found = {"preprocessor_config.json": json.dumps(config).encode()}
    if processor is not None:
        found["processor_config.json"] = json.dumps(processor).encode()
    return found


def read(
    found: dict[str, bytes],
    *,
    tokens: int | None = 4,
    size: tuple[int, int] | None = None,
    choices: ImageChoices | None = None,
) -> ImageSpec:
    return image_spec(
        found, family="llava", tokens=tokens, size=size, choices=choices or ImageChoices()
    )


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels(image: Image.Image, spec: ImageSpec) -> bytes:
    feeds = prepare(load_image(image, spec), spec).feeds
    return b"".join(np.ascontiguousarray(feed["pixels"]).tobytes() for feed in feeds)


FIXED_REFEREES = [
    CLIPImageProcessorPil(),
    CLIPImageProcessorPil(size=48, crop_size=48),
    CLIPImageProcessorPil(size={"shortest_edge": 50}, crop_size={"height": 40, "width": 44}),
    CLIPImageProcessorPil(
        size={"height": 40, "width": 48}, do_center_crop=False, image_mean=[0.5] * 3, resample=2
    ),
    CLIPImageProcessorPil(size=40, default_to_square=True, do_center_crop=False),
    CLIPImageProcessorPil(do_resize=False, crop_size=64, do_normalize=False),
    CLIPImageProcessorPil(size=48, crop_size=48, rescale_factor=1 / 127.5, image_std=0.25),
    SiglipImageProcessorPil(),
    SiglipImageProcessorPil(size={"height": 48, "width": 32}, resample=0, do_convert_rgb=None),
    LlavaImageProcessorPil(size=48, crop_size=48),
    LlavaImageProcessorPil(size=48, crop_size=48, do_pad=True),
]


@pytest.mark.parametrize("size", [(60, 40), (40, 61), (30, 30)])
@pytest.mark.parametrize("number", range(len(FIXED_REFEREES)))
def test_fixed_pictures_are_the_referees(
    number: int, size: tuple[int, int], tmp_path: Path
) -> None:
    referee = FIXED_REFEREES[number]
    referee.save_pretrained(tmp_path)
    spec = read({"preprocessor_config.json": (tmp_path / "preprocessor_config.json").read_bytes()})
    theirs = np.stack(referee(picture(*size))["pixel_values"]).astype(np.float32)
    assert pixels(picture(*size), spec) == np.ascontiguousarray(theirs).tobytes()
    assert spec.tokens == (4,)
    assert ImageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("referee_class", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("chosen", [None, True, False])
def test_tiles_are_the_referees(
    referee_class: type, split: bool, chosen: bool | None, tmp_path: Path
) -> None:
    options = {
        "size": {"longest_edge": 96},
        "max_image_size": {"longest_edge": 32},
        "do_image_splitting": split,
    }
    referee_class(**options).save_pretrained(tmp_path)
    spec = read(
        {"preprocessor_config.json": (tmp_path / "preprocessor_config.json").read_bytes()},
        choices=ImageChoices(split=chosen),
    )
    referee = referee_class(
        **{**options, "do_image_splitting": split if chosen is None else chosen}
    )
    theirs = referee([[picture(70, 50)]], return_tensors="np")["pixel_values"]
    assert pixels(picture(70, 50), spec) == np.ascontiguousarray(theirs).tobytes()


def test_defaults_of_the_tiled_classes_are_the_referees() -> None:
    spec = read(files({"image_processor_type": "SmolVLMImageProcessorFast"}))
    referee = SmolVLMImageProcessorPil()
    assert isinstance(spec.geometry, TiledGeometry)
    assert spec.geometry.longest_edge == referee.size.longest_edge
    assert spec.geometry.tile == referee.max_image_size["longest_edge"]
    assert spec.geometry.split is referee.do_image_splitting
    assert (spec.mean, spec.std) == (tuple(referee.image_mean), tuple(referee.image_std))
    assert Image.Resampling[spec.resample.upper()] == referee.resample


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"shortest_edge": 28 * 28, "longest_edge": 784 * 40}},
        {"min_pixels": 28 * 28, "max_pixels": 784 * 40},
        {"patch_size": 7, "merge_size": 3, "temporal_patch_size": 1},
        {},
    ],
)
def test_native_pictures_are_the_referees(options: dict[str, Any], tmp_path: Path) -> None:
    referee = Qwen2VLImageProcessorPil(**options)
    referee.save_pretrained(tmp_path)
    theirs = referee(picture(210, 126), return_tensors="np")
    grid = tuple(int(side) for side in theirs["image_grid_thw"][0][1:])
    spec = read(
        {"preprocessor_config.json": (tmp_path / "preprocessor_config.json").read_bytes()},
        tokens=None,
        choices=ImageChoices(grids=(grid, grid)),
    )
    assert isinstance(spec.geometry, NativeGeometry)
    assert spec.geometry.grids == (grid,)
    assert spec.tokens == (grid[0] * grid[1] // spec.geometry.merge**2,)
    assert pixels(picture(210, 126), spec) == theirs["pixel_values"].tobytes()


def test_old_pixel_bounds_win_over_the_size() -> None:
    old = {**NATIVE, "size": {"shortest_edge": 1, "longest_edge": 9}, "min_pixels": 4096}
    spec = read(files(old), tokens=None, choices=ImageChoices(grids=((2, 2),)))
    assert isinstance(spec.geometry, NativeGeometry)
    assert (spec.geometry.min_pixels, spec.geometry.max_pixels) == (4096, 9)
    assert Qwen2VLImageProcessorPil(**{k: v for k, v in old.items() if k != "image_processor_type"})


def test_the_processor_file_wins_where_it_nests_the_image_processor() -> None:
    nested = {"image_processor": {**CLIP, "crop_size": 16}}
    spec = read(files({**CLIP, "crop_size": 32}, nested))
    assert spec.geometry == FixedGeometry(shortest_edge=224, crop=(16, 16))


def test_the_processors_count_of_tokens_is_the_models() -> None:
    clip = {**CLIP, "crop_size": 28, "size": 28}
    counts = {"patch_size": 7, "num_additional_image_tokens": 1}
    for strategy, tokens in (("default", 16), ("full", 17)):
        processor = {**counts, "vision_feature_select_strategy": strategy}
        assert read(files(clip, processor), tokens=tokens).tokens == (tokens,)
        with pytest.raises(ModelError) as caught:
            read(files(clip, processor), tokens=9)
        assert str(caught.value) == (
            f"processor_config.json makes {tokens} image tokens of a picture, the model 9\n"
            "  hint: take both files from the same checkpoint"
        )
    assert read(files(TILED, {"image_seq_len": 8}), tokens=8).tokens == (8,)
    with pytest.raises(ModelError, match="makes 169 image tokens of a picture, the model 8"):
        read(files(TILED, {}), tokens=8)


@pytest.mark.parametrize(
    ("config", "choices", "message"),
    [
        (
            {},
            {},
            "preprocessor_config.json: 'image_processor_type' is missing, which family 'llava' "
            "needs" + REPOSITORY,
        ),
        (
            {"image_processor_type": "ViTImageProcessor"},
            {},
            "preprocessor_config.json: image_processor_type is 'ViTImageProcessor', expected one "
            "of 'CLIPImageProcessor', 'Idefics3ImageProcessor', 'LlavaImageProcessor', "
            "'Qwen2VLImageProcessor', 'SiglipImageProcessor', 'SmolVLMImageProcessor'\n"
            "  hint: compile a checkpoint with one of these",
        ),
        (
            {**CLIP, "do_flip": True},
            {},
            "preprocessor_config.json: family 'llava' does not know 'do_flip' = True\n"
            "  hint: remove it if it has no effect on the model; else the family must learn it",
        ),
        (
            {**CLIP, "do_pad": True},
            {},
            "preprocessor_config.json: 'do_pad' is True, which family 'llava' does not do: it does "
            "False\n  hint: compile a checkpoint without it",
        ),
        (
            {**CLIP, "size": {"shortest_edge": 30, "longest_edge": 60}},
            {},
            "preprocessor_config.json: size is {'shortest_edge': 30, 'longest_edge': 60}, expected "
            "'shortest_edge', or 'height' and 'width'\n"
            "  hint: compile a checkpoint with such a size",
        ),
        (
            {**CLIP, "size": 0},
            {},
            "preprocessor_config.json: size is {'edge': 0}, expected whole numbers\n"
            "  hint: compile a checkpoint with such a size",
        ),
        (
            {**CLIP, "do_center_crop": False},
            {},
            "preprocessor_config.json: the size of the pixels depends on the picture\n"
            "  hint: set do_center_crop, or give size a height and a width",
        ),
        (
            {**CLIP, "crop_size": {"shortest_edge": 3}},
            {},
            "preprocessor_config.json: crop_size is {'shortest_edge': 3}, expected 'height' and "
            "'width'\n  hint: compile a checkpoint with such a size",
        ),
        (
            {**CLIP, "image_mean": [0.5]},
            {},
            "preprocessor_config.json: image_mean is [0.5], expected three numbers" + REPOSITORY,
        ),
        (
            {**CLIP, "resample": 9},
            {},
            "preprocessor_config.json: resample is 9, expected 0 to 5" + REPOSITORY,
        ),
        (
            {**CLIP, "do_rescale": "yes"},
            {},
            "preprocessor_config.json: 'do_rescale' is 'yes', expected bool" + REPOSITORY,
        ),
        (
            {**TILED, "size": {"height": 3, "width": 3}},
            {},
            "preprocessor_config.json: size is {'height': 3, 'width': 3}, expected "
            "'longest_edge'\n  hint: compile a checkpoint with such a size",
        ),
        (
            {**TILED, "do_resize": False},
            {},
            "preprocessor_config.json: 'do_resize' is False, which family 'llava' does not do: it "
            "does True\n  hint: compile a checkpoint without it",
        ),
        (
            CLIP,
            {"split": True},
            "family 'llava' does not split pictures\n  hint: leave image splitting out",
        ),
        (
            TILED,
            {"grids": ((2, 2),)},
            "family 'llava' takes pictures of one size, and grids are chosen\n"
            "  hint: leave the grids out",
        ),
        (
            NATIVE,
            {},
            "family 'llava' takes pictures of any size, and no grids are chosen\n"
            "  hint: list the patch grids to compile for, such as [32, 32], in the recipe",
        ),
        (
            NATIVE,
            {"grids": ((3, 4),)},
            "grid [3, 4] is not made of squares of 2 x 2 patches\n"
            "  hint: choose heights and widths that are multiples of 2",
        ),
        (
            {**NATIVE, "size": {"longest_edge": 9}},
            {"grids": ((2, 2),)},
            "preprocessor_config.json: size is {'longest_edge': 9}, expected 'shortest_edge' and "
            "'longest_edge'\n  hint: compile a checkpoint with such a size",
        ),
    ],
)
def test_what_cannot_be_done_as_asked_is_an_error(
    config: dict[str, Any], choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        read(files(config), choices=ImageChoices(**choices))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {},
            "the checkpoint has no preprocessor_config.json\n"
            "  hint: take it from the checkpoint's own repository",
        ),
        (
            {"preprocessor_config.json": b"{"},
            "preprocessor_config.json is not JSON: Expecting property name enclosed in double "
            "quotes: line 1 column 2 (char 1)",
        ),
        (
            {"preprocessor_config.json": b"[]"},
            "preprocessor_config.json holds a list, expected an object",
        ),
        (
            files(CLIP, {"image_seq_length": 7}),
            "processor_config.json: family 'llava' does not know 'image_seq_length' = 7\n"
            "  hint: remove it if it has no effect on the model; else the family must learn it",
        ),
    ],
)
def test_wrong_files_are_named(found: dict[str, bytes], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(found)
    assert str(caught.value) == message


def test_pictures_of_another_size_than_the_encoders_are_an_error() -> None:
    assert read(files(CLIP), size=(224, 224)).tokens == (4,)
    with pytest.raises(ModelError) as caught:
        read(files(CLIP), size=(336, 336))
    assert str(caught.value) == (
        "preprocessor_config.json makes pictures of 224 x 224, the vision encoder reads 336 x 336\n"
        "  hint: take both files from the same checkpoint"
    )
