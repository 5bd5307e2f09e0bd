"""From 8-bit RGB to float32, to the bit as transformers' Pillow image processors do it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevlm_runtime.images.spec import ImageSpec

# H, W height and width of the picture; P patches; C 3 channels; t temporal, p patch, m merge


def write_pixels(picture: Image.Image, out_CHW: NDArray[np.float32], spec: ImageSpec) -> None:
    """Fill `out_CHW` with the rescaled and normalised pixels."""
    pixels_HWC = np.asarray(picture)
    for channel in range(3):
        out_CHW[channel] = _normalised(pixels_HWC[..., channel], channel, spec)


def patches(
    picture: Image.Image, spec: ImageSpec, *, patch: int, merge: int, temporal: int
) -> NDArray[np.float32]:
    """Pixels [P, C * t * p * p], the patches of one merged square following each other.

    A still picture is repeated along the temporal axis.
    """
    rows, columns = picture.height // patch // merge, picture.width // patch // merge
    pixels = np.asarray(picture).reshape(rows, merge, patch, columns, merge, patch, 3)
    out = np.empty((rows, columns, merge, merge, 3, temporal, patch, patch), np.float32)
    for channel in range(3):
        plane = pixels[..., channel].transpose(0, 3, 1, 4, 2, 5)
        out[:, :, :, :, channel] = _normalised(plane, channel, spec)[:, :, :, :, None]
    return out.reshape(rows * columns * merge * merge, 3 * temporal * patch * patch)


def _normalised(plane: NDArray[np.uint8], channel: int, spec: ImageSpec) -> NDArray[np.float32]:
    """Rescale in float64, round to float32, then subtract and divide in float32, in this order."""
    if spec.rescale is None:
        values = plane.astype(np.float32)
    else:
        values = (plane.astype(np.float64) * spec.rescale).astype(np.float32)
    if spec.mean is not None and spec.std is not None:
        values -= np.float32(spec.mean[channel])
        values /= np.float32(spec.std[channel])
    return values
