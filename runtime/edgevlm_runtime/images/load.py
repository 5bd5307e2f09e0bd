"""Decoding a picture, and the rules that make 8-bit RGB of it.

Everything that is wrong with a picture is found here, before any work is done on it: its size is
read from the header and checked before it is decoded, and whatever a decoder raises on bytes that
are not what they claim to be becomes one `InputError`. Of an animation the first frame is taken.
"""

from __future__ import annotations

import io
import stat
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from edgevlm_runtime.errors import InputError
from edgevlm_runtime.images.spec import ConversionRules

ImageSource = str | Path | bytes | NDArray[np.uint8] | Image.Image

# What Pillow's decoders raise on damaged bytes, as found by mutating pictures of every format;
# the warning where a program makes warnings errors.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    NotImplementedError,
    UserWarning,
    struct.error,
    zlib.error,
)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_OPAQUE = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
_ALPHA = ("LA", "PA", "RGBA")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B")
_EXIF_ORIENTATION = 0x0112
_SHRINK = "scale it down first"
_SAVE = "save the picture again, as PNG or JPEG"
_FILE = "give the path of a picture file that can be read"


def read_picture(source: ImageSource, rules: ConversionRules) -> Image.Image:
    """Any source as an 8-bit RGB picture, or `InputError`."""
    if isinstance(source, np.ndarray):
        return _from_array(source, rules)
    if isinstance(source, Image.Image):
        _check_size(source.size, rules)
        return _converted(source, rules)
    if isinstance(source, (str, Path)):
        return _from_bytes(_file_bytes(Path(source), rules), f"{str(source)!r}", rules)
    if isinstance(source, bytes):
        return _from_bytes(source, "picture", rules)
    raise InputError(
        f"a picture cannot be made from a {type(source).__name__}",
        hint="give a path, encoded bytes, a uint8 array [height, width, 3] or a Pillow image",
    )


def _from_array(array: NDArray[Any], rules: ConversionRules) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise InputError(
            f"picture array is {array.dtype} {list(array.shape)}, "
            "expected uint8 [height, width, 3]",
            hint="convert it to RGB bytes, 0 to 255, or give a Pillow image",
        )
    _check_size((array.shape[1], array.shape[0]), rules)
    return Image.fromarray(np.ascontiguousarray(array))


def _file_bytes(path: Path, rules: ConversionRules) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{str(path)!r} is not a regular file", hint=_FILE)
        _check_bytes(status.st_size, f"{str(path)!r}", rules)
        with path.open("rb") as file:
            return file.read(rules.max_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"cannot read picture {str(path)!r}: {reason}", hint=_FILE) from error


def _from_bytes(data: bytes, name: str, rules: ConversionRules) -> Image.Image:
    _check_bytes(len(data), name, rules)
    try:
        picture = Image.open(io.BytesIO(data), formats=rules.formats)
    except UnidentifiedImageError as error:
        known = ", ".join(rules.formats)
        raise InputError(f"{name} is damaged, or is none of {known}", hint=_SAVE) from error
    except _BOMB as error:
        raise InputError(
            f"{name} has more than {rules.max_pixels:,} pixels", hint=_SHRINK
        ) from error
    except _DAMAGE as error:
        raise InputError(f"{name} is damaged: {error}", hint=_SAVE) from error
    _check_size(picture.size, rules, name)
    return _converted(picture, rules, name)


def _check_bytes(size: int, name: str, rules: ConversionRules) -> None:
    if size == 0:
        raise InputError(f"{name} is empty", hint=_SAVE)
    if size > rules.max_bytes:
        raise InputError(
            f"{name} has {size:,} bytes, at most {rules.max_bytes:,} are read", hint=_SHRINK
        )


def _check_size(size: tuple[int, int], rules: ConversionRules, name: str = "picture") -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{name} is {width} x {height} pixels", hint="give at least one pixel")
    if width * height > rules.max_pixels:
        raise InputError(
            f"{name} is {width} x {height}, {width * height:,} pixels, "
            f"at most {rules.max_pixels:,} are decoded",
            hint=_SHRINK,
        )


def _converted(picture: Image.Image, rules: ConversionRules, name: str = "picture") -> Image.Image:
    """8-bit RGB of a picture, which is decoded here where it was not before."""
    if picture.mode not in (*_OPAQUE, *_ALPHA, *_SIXTEEN_BIT):
        raise InputError(
            f"{name} has mode {picture.mode!r}",
            hint=f"convert it to one of {', '.join((*_OPAQUE, *_ALPHA, *_SIXTEEN_BIT))}",
        )
    try:
        picture.load()
        if rules.exif_transpose and picture.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
    except _DAMAGE as error:
        raise InputError(f"{name} is damaged: {error}", hint=_SAVE) from error
    if picture.mode in _SIXTEEN_BIT:
        picture = _eight_bit(picture, rules.sixteen_bit_divisor)
    if picture.mode in _ALPHA or picture.info.get("transparency") is not None:
        background = Image.new("RGBA", picture.size, (*rules.background, 255))
        picture = Image.alpha_composite(background, picture.convert("RGBA"))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _eight_bit(picture: Image.Image, divisor: int) -> Image.Image:
    """16-bit grey divided and rounded to nearest; a transparent grey value becomes alpha."""
    grey = np.asarray(picture).astype(np.uint32)
    narrow = Image.fromarray(((grey + divisor // 2) // divisor).astype(np.uint8))
    transparent = picture.info.get("transparency")
    if transparent is not None:
        alpha = np.where(grey == transparent, 0, 255).astype(np.uint8)
        return Image.merge("LA", (narrow, Image.fromarray(alpha)))
    return narrow
