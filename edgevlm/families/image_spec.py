"""From a checkpoint's image processor configuration to the runtime's `ImageSpec`.

The fields mean what they mean to transformers' Pillow image processors: a field that is absent has
the default of its processor's class, and every field is read, known to be without effect on the
pixels of one picture, or an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgevlm.errors import ModelError
from edgevlm.families.fields import Fields
from edgevlm.families.processor_files import PROCESSOR, image_processor, json_file
from edgevlm_runtime.images.spec import (
    RESAMPLES,
    FixedGeometry,
    Geometry,
    ImageSpec,
    NativeGeometry,
    TiledGeometry,
)

Triple = tuple[float, float, float]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
HALF: Triple = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageChoices:
    """What a recipe may choose where the processor leaves it to the picture.

    `split` turns image splitting on or off (None: as the checkpoint says); `grids` (height, width,
    in patches) are the static sizes of a native-resolution family.
    """

    split: bool | None = None
    grids: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorClass:
    """A class of image processors: how it cuts pictures, and its defaults."""

    geometry: str
    resample: str
    mean: Triple
    std: Triple
    size: Mapping[str, int]
    crop: Mapping[str, int] | None = None
    pads_to_square: bool = False


_CLIP = ProcessorClass(
    geometry="fixed",
    resample="bicubic",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    size={"shortest_edge": 224},
    crop={"height": 224, "width": 224},
)
_IDEFICS3 = ProcessorClass(
    geometry="tiled", resample="lanczos", mean=HALF, std=HALF, size={"longest_edge": 4 * 364}
)
CLASSES: dict[str, ProcessorClass] = {
    "CLIPImageProcessor": _CLIP,
    "Idefics3ImageProcessor": _IDEFICS3,
    "LlavaImageProcessor": replace(_CLIP, pads_to_square=True),
    "Qwen2VLImageProcessor": ProcessorClass(
        geometry="native",
        resample="bicubic",
        mean=CLIP_MEAN,
        std=CLIP_STD,
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    ),
    "SiglipImageProcessor": ProcessorClass(
        geometry="fixed",
        resample="bicubic",
        mean=HALF,
        std=HALF,
        size={"height": 224, "width": 224},
    ),
    "SmolVLMImageProcessor": _IDEFICS3,
}

# Bookkeeping, the form of what is returned, and conversion to RGB, which the runtime always does.
_WITHOUT_EFFECT = (
    "_processor_class",
    "_valid_processor_keys",
    "data_format",
    "device",
    "disable_grouping",
    "do_convert_rgb",
    "image_seq_length",
    "input_data_format",
    "processor_class",
    "return_row_col_info",
    "return_tensors",
    "video_sampling",
)


def image_spec(
    files: Mapping[str, bytes],
    *,
    family: str,
    tokens: int | None,
    size: tuple[int, ...] | None,
    choices: ImageChoices,
) -> ImageSpec:
    """Read `preprocessor_config.json`, or the `image_processor` of `processor_config.json`.

    `tokens` is the number of visual tokens of one call of the vision graph and `size` the height
    and width of its pixels, both None for a native-resolution family, where the grid says them.
    """
    values, file, where = image_processor(files)
    fields = Fields(values, family=family, file=file, where=where)
    name = fields.take("image_processor_type", str)
    kind = CLASSES.get(name.removesuffix("Fast").removesuffix("Pil"))
    if kind is None:
        raise ModelError(
            f"{file}: image_processor_type is {name!r}, "
            f"expected one of {', '.join(repr(known) for known in CLASSES)}",
            hint="compile a checkpoint with one of these",
        )
    _check_choices(kind, choices, family)
    mean, std = _triple(fields, "image_mean", kind.mean), _triple(fields, "image_std", kind.std)
    normalise = fields.take("do_normalize", bool, True)
    rescale = fields.take("rescale_factor", float, 1 / 255)
    rescaled = fields.take("do_rescale", bool, True)
    geometry: Geometry
    if kind.geometry == "fixed":
        geometry = _fixed(fields, kind, mean)
    elif kind.geometry == "tiled":
        geometry = _tiled(fields, kind, choices)
    else:
        geometry = _native(fields, kind, choices)
    spec = ImageSpec(
        geometry=geometry,
        resample=_resample(fields, kind),
        rescale=rescale if rescaled else None,
        mean=mean if normalise else None,
        std=std if normalise else None,
        tokens=_tokens(geometry, tokens),
    )
    fields.ignore(*_WITHOUT_EFFECT)
    fields.finish()
    if not isinstance(geometry, NativeGeometry):
        _check_size(geometry.output, size, file)
    _check_processor(files, family, spec)
    return spec


def _fixed(fields: Fields, kind: ProcessorClass, mean: Triple) -> FixedGeometry:
    pad_colour = None
    if kind.pads_to_square and fields.take("do_pad", bool, False):
        pad_colour = (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255))
    fields.only("do_pad", pad_colour is not None)
    fields.ignore("pad_size")

    shortest_edge, size = _resize(fields, kind)
    crop = _crop(fields, kind)
    if crop is None and size is None:
        raise ModelError(
            f"{fields.file}: the size of the pixels depends on the picture",
            hint="set do_center_crop, or give size a height and a width",
        )
    return FixedGeometry(pad_colour=pad_colour, shortest_edge=shortest_edge, size=size, crop=crop)


def _resize(fields: Fields, kind: ProcessorClass) -> tuple[int | None, tuple[int, int] | None]:
    """What pictures are resized to: their shortest edge, or a height and a width."""
    square = fields.take("default_to_square", bool, False)
    wanted = _size(fields, "size", kind.size)
    if not fields.take("do_resize", bool, True):
        return None, None
    if set(wanted) == {"edge"}:
        edge = wanted["edge"]
        return (None, (edge, edge)) if square else (edge, None)
    if set(wanted) == {"shortest_edge"}:
        return wanted["shortest_edge"], None
    if set(wanted) == {"height", "width"}:
        return None, (wanted["height"], wanted["width"])
    raise _bad_size(fields, "size", wanted, "'shortest_edge', or 'height' and 'width'")


def _crop(fields: Fields, kind: ProcessorClass) -> tuple[int, int] | None:
    """The height and width that the middle of a picture is cut to, or None."""
    wanted = _size(fields, "crop_size", kind.crop or {"height": 1, "width": 1})
    if not fields.take("do_center_crop", bool, kind.crop is not None):
        return None
    if set(wanted) == {"edge"}:
        return wanted["edge"], wanted["edge"]
    if set(wanted) == {"height", "width"}:
        return wanted["height"], wanted["width"]
    raise _bad_size(fields, "crop_size", wanted, "'height' and 'width'")


def _tiled(fields: Fields, kind: ProcessorClass, choices: ImageChoices) -> TiledGeometry:
    fields.only("do_resize", True)
    # Tiles all have one size, so that padding has nothing to do; there is no crop.
    fields.ignore("crop_size", "default_to_square", "do_center_crop", "do_pad", "pad_size")
    size = _size(fields, "size", kind.size)
    tile = _size(fields, "max_image_size", {"longest_edge": 364})
    for name, value in (("size", size), ("max_image_size", tile)):
        if set(value) != {"longest_edge"}:
            raise _bad_size(fields, name, value, "'longest_edge'")
    split = fields.take("do_image_splitting", bool, True)
    return TiledGeometry(
        longest_edge=size["longest_edge"],
        tile=tile["longest_edge"],
        split=split if choices.split is None else choices.split,
    )


def _native(fields: Fields, kind: ProcessorClass, choices: ImageChoices) -> NativeGeometry:
    fields.only("do_resize", True)
    fields.ignore("crop_size", "default_to_square", "do_center_crop", "do_pad", "pad_size")
    size = _size(fields, "size", kind.size)
    min_pixels = fields.maybe("min_pixels", int) or size.get("shortest_edge")
    max_pixels = fields.maybe("max_pixels", int) or size.get("longest_edge")
    if min_pixels is None or max_pixels is None or not set(size) <= set(kind.size):
        raise _bad_size(fields, "size", size, "'shortest_edge' and 'longest_edge'")
    merge = fields.take("merge_size", int, 2)
    if not choices.grids:
        raise ModelError(
            f"family {fields.family!r} takes pictures of any size, and no grids are chosen",
            hint="list the patch grids to compile for, such as [32, 32], in the recipe",
        )
    for grid in choices.grids:
        if min(grid) < merge or grid[0] % merge or grid[1] % merge:
            raise ModelError(
                f"grid {list(grid)} is not made of squares of {merge} x {merge} patches",
                hint=f"choose heights and widths that are multiples of {merge}",
            )
    return NativeGeometry(
        patch=fields.take("patch_size", int, 14),
        merge=merge,
        temporal_patch=fields.take("temporal_patch_size", int, 2),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        grids=tuple(dict.fromkeys(choices.grids)),
    )


def _tokens(geometry: Geometry, tokens: int | None) -> tuple[int, ...]:
    if isinstance(geometry, NativeGeometry):
        return tuple(height * width // geometry.merge**2 for height, width in geometry.grids)
    assert tokens is not None, "the family of a fixed size knows its tokens"
    return (tokens,)


def _check_choices(kind: ProcessorClass, choices: ImageChoices, family: str) -> None:
    if choices.split is not None and kind.geometry != "tiled":
        raise ModelError(
            f"family {family!r} does not split pictures", hint="leave image splitting out"
        )
    if choices.grids is not None and kind.geometry != "native":
        raise ModelError(
            f"family {family!r} takes pictures of one size, and grids are chosen",
            hint="leave the grids out",
        )


def _check_size(output: tuple[int, int], size: tuple[int, ...] | None, file: str) -> None:
    if size is not None and output != size:
        raise ModelError(
            f"{file} makes pictures of {output[0]} x {output[1]}, "
            f"the vision encoder reads {size[0]} x {size[1]}",
            hint="take both files from the same checkpoint",
        )


def _check_processor(files: Mapping[str, bytes], family: str, spec: ImageSpec) -> None:
    """The processor's own count of visual tokens must be the model's."""
    values = json_file(files, PROCESSOR)
    if values is None:
        return
    fields = Fields(values, family=family, file=PROCESSOR)
    fields.ignore(
        "audio_tokenizer", "chat_template", "image_processor", "image_token", "processor_class"
    )
    count = None
    if isinstance(spec.geometry, FixedGeometry):
        patch = fields.maybe("patch_size", int)
        additional = fields.take("num_additional_image_tokens", int, 0)
        strategy = fields.maybe("vision_feature_select_strategy", str)
        if patch is not None:
            height, width = spec.geometry.output
            count = (height // patch) * (width // patch) + additional - (strategy == "default")
    elif isinstance(spec.geometry, TiledGeometry):
        count = fields.take("image_seq_len", int, 169)
        fields.ignore("video_processor")
    else:
        fields.ignore("video_processor", "video_token")
    fields.finish()
    if count is not None and count != spec.tokens[0]:
        raise ModelError(
            f"{PROCESSOR} makes {count} image tokens of a picture, the model {spec.tokens[0]}",
            hint="take both files from the same checkpoint",
        )


def _size(fields: Fields, name: str, default: Mapping[str, int]) -> dict[str, int]:
    """A size by its keys; one number is `{"edge": number}`."""
    if type(fields.peek(name)) is int:
        value: dict[str, Any] = {"edge": fields.take(name, int)}
    else:
        value = fields.take(name, dict, dict(default))
    value = {key: side for key, side in value.items() if side is not None}
    if not value or any(type(side) is not int or side < 1 for side in value.values()):
        raise _bad_size(fields, name, value, "whole numbers")
    return value


def _bad_size(fields: Fields, name: str, value: Mapping[str, Any], expected: str) -> ModelError:
    return ModelError(
        f"{fields.file}: {fields.where}{name} is {dict(value)}, expected {expected}",
        hint="compile a checkpoint with such a size",
    )


def _triple(fields: Fields, name: str, default: Triple) -> Triple:
    """One number for each of red, green and blue."""
    value = fields.peek(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = fields.take(name, float)
        return (number, number, number)
    numbers = fields.take(name, list, list(default))
    if len(numbers) != 3 or not all(type(number) in (int, float) for number in numbers):
        raise fields.error(f"{fields.where}{name} is {numbers!r}, expected three numbers")
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))


def _resample(fields: Fields, kind: ProcessorClass) -> str:
    number = fields.take("resample", int, RESAMPLES.index(kind.resample))
    if not 0 <= number < len(RESAMPLES):
        raise fields.error(
            f"{fields.where}resample is {number}, expected 0 to {len(RESAMPLES) - 1}"
        )
    return RESAMPLES[number]
