"""Pictures as they come: every mode by its rule, and everything wrong as one `InputError`."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from edgevlm_runtime.errors import InputError
from edgevlm_runtime.image import (
    ConversionRules,
    FixedGeometry,
    ImageSpec,
    NativeGeometry,
    TiledGeometry,
    load_image,
    prepare,
)

NUMBERS: dict[str, Any] = {
    "resample": "bicubic",
    "rescale": 1 / 255,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
FIXED = ImageSpec(geometry=FixedGeometry(shortest_edge=8, crop=(8, 8)), tokens=(1,), **NUMBERS)
TILED = ImageSpec(geometry=TiledGeometry(longest_edge=16, tile=8), tokens=(1,), **NUMBERS)
NATIVE = ImageSpec(
    geometry=NativeGeometry(
        patch=4,
        merge=2,
        temporal_patch=2,
        min_pixels=64,
        max_pixels=1024,
        grids=((2, 2), (4, 2)),
    ),
    tokens=(1, 2),
    **NUMBERS,
)
MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "PA", "RGBA", "I;16", "I;16L", "I;16B")
HINT_SAVE = "\n  hint: save the picture again, as PNG or JPEG"
HINT_SHRINK = "\n  hint: scale it down first"
HINT_FILE = "\n  hint: give the path of a picture file that can be read"
HINT_PIXELS = "\n  hint: give at least one pixel"
HINT_ARRAY = "\n  hint: convert it to RGB bytes, 0 to 255, or give a Pillow image"
HINT_SOURCES = (
    "\n  hint: give a path, encoded bytes, a uint8 array [height, width, 3] or a Pillow image"
)
HINT_MODES = "\n  hint: convert it to one of " + ", ".join(MODES)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels))
    return values.astype(np.uint8)


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def loaded(source: Any, rules: ConversionRules | None = None) -> NDArray[np.uint8]:
    spec = ImageSpec(
        geometry=FIXED.geometry, tokens=(1,), rules=rules or ConversionRules(), **NUMBERS
    )
    picture = load_image(source, spec)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def refusal(source: Any, rules: ConversionRules | None = None) -> str:
    with pytest.raises(InputError) as caught:
        loaded(source, rules)
    return str(caught.value)


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"IEND"
    chunks = (struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))) + (
        struct.pack(">I", 0) + end + struct.pack(">I", zlib.crc32(end))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


# --- by rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "BMP", "WEBP"])
def test_every_source_gives_the_same_pixels(form: str, tmp_path: Path) -> None:
    pixels = noise(5, 7)
    data = encoded(Image.fromarray(pixels), form, **({"lossless": True} if form == "WEBP" else {}))
    path = tmp_path / "picture"
    path.write_bytes(data)
    for source in (
        pixels,
        Image.fromarray(pixels),
        data,
        path,
        str(path),
        pixels[:, ::-1][:, ::-1],
    ):
        assert np.array_equal(loaded(source), pixels)


def test_a_jpeg_is_decoded_at_full_quality() -> None:
    data = encoded(Image.fromarray(noise(40, 40)), "JPEG", quality=80)
    assert np.array_equal(loaded(data), np.asarray(Image.open(io.BytesIO(data))))


def test_a_pillow_image_is_not_changed() -> None:
    picture = Image.fromarray(noise(4, 6, 4), "RGBA")
    before = picture.tobytes(), picture.mode, picture.size
    loaded(picture)
    assert (picture.tobytes(), picture.mode, picture.size) == before


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "RGB", "P", "PA", "CMYK", "YCbCr"])
def test_modes_are_converted_as_the_referee_does(mode: str) -> None:
    base = Image.fromarray(noise(9, 8, 4), "RGBA")
    picture = base.convert("RGB").convert("P").convert("PA") if mode == "PA" else None
    picture = picture or base.convert("RGB" if mode == "YCbCr" else "RGBA").convert(mode)
    assert picture.mode == mode
    assert np.array_equal(loaded(picture), convert_to_rgb(picture, return_numpy=True))


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_transparent_colour_is_composited(mode: str) -> None:
    picture = Image.fromarray(noise(9, 8)).quantize(4).convert(mode)
    transparent = picture.getpixel((0, 0))
    picture.info["transparency"] = transparent
    data = encoded(picture, "PNG", transparency=transparent)
    ours = loaded(data)
    assert np.array_equal(ours, convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True))
    assert ours[0, 0].tolist() == [255, 255, 255]


def test_alpha_shows_the_background_of_the_rules() -> None:
    rules = ConversionRules(background=(10, 20, 30))
    alpha = Image.fromarray(np.array([[[200, 100, 50, 0], [200, 100, 50, 255]]], np.uint8), "RGBA")
    assert loaded(alpha, rules).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    half = Image.fromarray(np.array([[[200, 100, 50, 128]]], np.uint8), "RGBA")
    mixed = (128 * np.array([200, 100, 50]) + 127 * np.array([10, 20, 30])) / 255
    # Pillow composites in integers: within one of the exact mixture.
    assert np.abs(loaded(half, rules)[0, 0] - mixed).max() <= 1


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 32767, 32768, 65407, 65535]], np.uint16)
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    assert expected.tolist() == [[0, 0, 1, 1, 127, 128, 255, 255]]
    png = encoded(Image.fromarray(values), "PNG")
    big_endian = Image.frombytes("I;16B", (8, 1), values.astype(">u2").tobytes())
    for source in (png, Image.fromarray(values), big_endian):
        assert np.array_equal(loaded(source), np.repeat(expected[..., None], 3, -1))


def test_a_transparent_sixteen_bit_grey_is_composited() -> None:
    picture = Image.fromarray(np.array([[700, 40000]], np.uint16))
    picture.info["transparency"] = 700
    assert loaded(picture).tolist() == [[[255] * 3, [156] * 3]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = noise(3, 5)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(turned)), "PNG", exif=exif)
    assert np.array_equal(loaded(data), upright)
    assert np.array_equal(loaded(data, ConversionRules(exif_transpose=False)), turned)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "picture is empty" + HINT_SAVE),
        (b"hello", "picture is damaged, or is none of JPEG, PNG, WEBP, BMP" + HINT_SAVE),
        (
            encoded(Image.new("RGB", (4, 4)), "GIF"),
            "picture is damaged, or is none of JPEG, PNG, WEBP, BMP" + HINT_SAVE,
        ),
        (
            encoded(Image.new("RGB", (4, 4)), "TIFF"),
            "picture is damaged, or is none of JPEG, PNG, WEBP, BMP" + HINT_SAVE,
        ),
        (
            png_header(5001, 5000),
            "picture is 5001 x 5000, 25,005,000 pixels, at most 25,000,000 are decoded"
            + HINT_SHRINK,
        ),
        (png_header(10_000, 9_000), "picture has more than 25,000,000 pixels" + HINT_SHRINK),
        (png_header(50_000, 50_000), "picture has more than 25,000,000 pixels" + HINT_SHRINK),
        (Image.new("RGB", (0, 5)), "picture is 0 x 5 pixels" + HINT_PIXELS),
        (Image.new("F", (2, 2)), "picture has mode 'F'" + HINT_MODES),
        (Image.new("I", (2, 2)), "picture has mode 'I'" + HINT_MODES),
        (Image.new("LAB", (2, 2)), "picture has mode 'LAB'" + HINT_MODES),
        (Image.new("HSV", (2, 2)), "picture has mode 'HSV'" + HINT_MODES),
        (
            noise(4, 4).astype(np.float32),
            "picture array is float32 [4, 4, 3], expected uint8 [height, width, 3]" + HINT_ARRAY,
        ),
        (
            noise(4, 4, 4),
            "picture array is uint8 [4, 4, 4], expected uint8 [height, width, 3]" + HINT_ARRAY,
        ),
        (
            noise(4, 4)[..., 0],
            "picture array is uint8 [4, 4], expected uint8 [height, width, 3]" + HINT_ARRAY,
        ),
        (
            noise(4, 4).transpose(2, 0, 1),
            "picture array is uint8 [3, 4, 4], expected uint8 [height, width, 3]" + HINT_ARRAY,
        ),
        (noise(4, 4)[:0], "picture is 4 x 0 pixels" + HINT_PIXELS),
        (
            np.zeros((5000, 5001, 3), np.uint8),
            "picture is 5001 x 5000, 25,005,000 pixels, at most 25,000,000 are decoded"
            + HINT_SHRINK,
        ),
        (
            None,
            "a picture cannot be made from a NoneType" + HINT_SOURCES,
        ),
        (
            [[0, 0, 0]],
            "a picture cannot be made from a list" + HINT_SOURCES,
        ),
        ("nowhere.png", "cannot read picture 'nowhere.png': No such file or directory" + HINT_FILE),
        ("a\0b", "cannot read picture 'a\\x00b': embedded null byte" + HINT_FILE),
        ("/dev/zero", "'/dev/zero' is not a regular file" + HINT_FILE),
        ("/", "'/' is not a regular file" + HINT_FILE),
    ],
)
def test_what_is_no_picture_gets_one_clear_error(source: Any, message: str) -> None:
    assert refusal(source) == message


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert refusal(path) == f"'{path}' is not a regular file" + HINT_FILE


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(100_000_001)
    assert (
        refusal(path)
        == f"'{path}' has 100,000,001 bytes, at most 100,000,000 are read" + HINT_SHRINK
    )


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    assert refusal(path) == f"'{path}' is empty" + HINT_SAVE


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("JPEG", "image file is truncated"),
        ("PNG", "image file is truncated"),
        ("BMP", "image file is truncated"),
        ("WEBP", ""),
    ],
)
def test_a_truncated_picture_is_refused(form: str, reason: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(noise(40, 40)), form)
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    message = refusal(path)
    assert message.startswith(f"'{path}' is damaged")
    assert reason in message
    assert message.endswith(HINT_SAVE)


# --- any input -----------------------------------------------------------------------------------


@st.composite
def pictures(draw: st.DrawFn) -> Image.Image:
    mode = draw(st.sampled_from([*MODES, "I", "F", "LAB", "HSV", "RGBX", "La", "RGBa"]))
    width, height = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    size = len(Image.new(mode, (width, height)).tobytes())
    data = np.random.default_rng(draw(st.integers(0, 9))).bytes(size)
    picture = Image.frombytes(mode, (width, height), data) if size else Image.new(mode, (0, 0))
    if draw(st.booleans()) and mode in ("L", "P", "I;16"):
        picture.info["transparency"] = draw(st.integers(0, 255))
    return picture


@settings(max_examples=200, deadline=None)
@given(picture=pictures(), spec=st.sampled_from([FIXED, TILED, NATIVE]))
def test_a_picture_becomes_a_finite_tensor_or_an_error(
    picture: Image.Image, spec: ImageSpec
) -> None:
    if picture.mode not in MODES or 0 in picture.size:
        with pytest.raises(InputError):
            load_image(picture, spec)
        return
    prepared = prepare(load_image(picture, spec), spec)
    assert len(prepared.layout.tokens) == len(prepared.feeds)
    for feed in prepared.feeds:
        pixels = feed["pixels"]
        assert pixels.dtype == np.float32
        assert np.isfinite(pixels).all()
        if spec is NATIVE:
            height, width = prepared.layout.grid or (0, 0)
            assert pixels.shape == (height * width, 3 * 2 * 4 * 4)
        else:
            assert pixels.shape == (1, 3, 8, 8)


def valid_files() -> list[bytes]:
    picture = Image.fromarray(noise(12, 12))
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encoded(picture, "JPEG", exif=exif),
        encoded(picture, "JPEG", progressive=True),
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(picture, "PNG"),
        encoded(picture.quantize(5), "PNG", transparency=1),
        encoded(Image.fromarray(noise(12, 12).astype(np.uint16)[..., 0]), "PNG"),
        encoded(picture.convert("RGBA"), "PNG", exif=exif),
        encoded(picture, "WEBP"),
        encoded(picture.convert("RGBA"), "WEBP", lossless=True, exif=exif),
        encoded(picture, "BMP"),
        encoded(picture.quantize(5), "BMP"),
    ]


@settings(max_examples=400, deadline=None)
@given(
    data=st.sampled_from(valid_files()),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    length=st.floats(0, 1),
    cut=st.booleans(),
)
def test_damaged_bytes_become_pixels_or_an_error(
    data: bytes, edits: list[tuple[float, int]], length: float, cut: bool
) -> None:
    changed = bytearray(data)
    for place, value in edits:
        changed[int(place * (len(changed) - 1))] = value
    source = bytes(changed[: int(length * len(changed))] if cut else changed)
    try:
        picture = load_image(source, FIXED)
    except InputError:
        return
    assert picture.mode == "RGB"
    assert min(picture.size) >= 1


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_become_pixels_or_an_error(data: bytes) -> None:
    for head in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM", b"RIFF....WEBPVP8 "):
        try:
            load_image(head + data, FIXED)
        except InputError:
            continue
