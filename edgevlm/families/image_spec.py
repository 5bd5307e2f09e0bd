"""From a checkpoint's image processor configuration to the runtime's `ImageSpec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgevlm_runtime.images.spec import ImageSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageChoices:
    """What a recipe may choose where the processor leaves it to the picture.

    `split` turns image splitting on or off (None: as the checkpoint says); `grids` (height, width,
    in patches) are the static sizes of a native-resolution family.
    """

    split: bool | None = None
    grids: tuple[tuple[int, int], ...] | None = None


def image_spec(
    processor: Mapping[str, Any], *, tokens_per_picture: int | None, choices: ImageChoices
) -> ImageSpec:
    """Read `preprocessor_config.json` (or the `image_processor` of `processor_config.json`).

    `tokens_per_picture` is the number of visual tokens of one vision-graph call; None for a
    native-resolution family, where the grid gives it. Every field is read, known to be without
    effect, or a `ModelError` that names it.
    """
    raise NotImplementedError
