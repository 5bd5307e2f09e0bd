"""The manifest's image section is read strictly, and comes back as it went."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgevlm_runtime.errors import BundleError
from edgevlm_runtime.image import (
    ConversionRules,
    FixedGeometry,
    ImageSpec,
    NativeGeometry,
    TiledGeometry,
)

FIXED: dict[str, Any] = {"kind": "fixed", "shortest_edge": 8, "crop": [8, 8]}
TILED: dict[str, Any] = {"kind": "tiled", "longest_edge": 64, "tile": 32}
NATIVE: dict[str, Any] = {
    "kind": "native",
    "patch": 14,
    "merge": 2,
    "temporal_patch": 2,
    "min_pixels": 784,
    "max_pixels": 78400,
    "grids": [[4, 4]],
}
SECTION: dict[str, Any] = {
    "geometry": FIXED,
    "resample": "bicubic",
    "rescale": 1 / 255,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "tokens": [4],
}
HINT = "\n  hint: compile the bundle again, a manifest is not edited by hand"


@pytest.mark.parametrize(
    "geometry",
    [
        FixedGeometry(pad_colour=(1, 2, 3), size=(8, 6)),
        FixedGeometry(shortest_edge=9, crop=(8, 8)),
        TiledGeometry(longest_edge=64, tile=32, split=False),
        NativeGeometry(
            patch=14,
            merge=2,
            temporal_patch=2,
            min_pixels=784,
            max_pixels=78400,
            grids=((4, 4), (2, 8)),
        ),
    ],
)
def test_a_spec_survives_json(geometry: Any) -> None:
    spec = ImageSpec(
        geometry=geometry,
        resample="lanczos",
        rescale=1 / 255,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        tokens=(4, 4) if isinstance(geometry, NativeGeometry) else (4,),
        rules=ConversionRules(background=(0, 0, 0), formats=("PNG",), max_pixels=9),
        offsets=(((0.0,), (0.25,), (0.5,), (0.75,)),)
        * (2 if isinstance(geometry, NativeGeometry) else 1),
        spans=(1.0, 2.5) if isinstance(geometry, NativeGeometry) else (1.0,),
    )
    assert ImageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_what_may_be_left_out() -> None:
    spec = ImageSpec.from_json(SECTION)
    assert (spec.rules, spec.offsets, spec.spans) == (ConversionRules(), None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "image: unknown key 'colour'"),
        ({"resample": None}, "image.resample: expected a string, got null"),
        (
            {"resample": "cubic"},
            "image.resample: expected one of 'nearest', 'lanczos', 'bilinear', 'bicubic', 'box', "
            "'hamming', got 'cubic'",
        ),
        ({"mean": [1, 2]}, "image.mean: expected a list of 3, got [1, 2]"),
        ({"std": None}, "image.std: None does not go with mean (0.5, 0.5, 0.5)"),
        ({"std": [1, 0, 1]}, "image.std: (1.0, 0.0, 1.0) does not go with mean (0.5, 0.5, 0.5)"),
        ({"tokens": []}, "image.tokens: expected 1 positive numbers, got []"),
        ({"tokens": [0]}, "image.tokens: expected 1 positive numbers, got [0]"),
        (
            {"geometry": {"kind": "round"}},
            "image.geometry.kind: expected one of 'fixed', 'tiled', 'native', got 'round'",
        ),
        (
            {"geometry": 3},
            "image.geometry.kind: expected one of 'fixed', 'tiled', 'native', got None",
        ),
        (
            {"geometry": {**FIXED, "size": [8, 8]}},
            "image.geometry: shortest_edge and size exclude each other",
        ),
        (
            {"geometry": {**FIXED, "crop": None}},
            "image.geometry: the size of the tensor depends on the picture",
        ),
        ({"geometry": {**FIXED, "crop": [8, 0]}}, "image.geometry: 0 is not a size"),
        ({"geometry": {**FIXED, "shortest_edge": 0}}, "image.geometry: 0 is not a size"),
        ({"geometry": {**TILED, "tile": -1}}, "image.geometry: -1 is not a size"),
        ({"geometry": {**NATIVE, "grids": []}}, "image.geometry.grids: expected at least one"),
        ({"geometry": {**NATIVE, "merge": 0}}, "image.geometry: 0 is not a size"),
        (
            {"geometry": {**NATIVE, "grids": [[4, 3]]}},
            "image.geometry.grids: [4, 3] is not made of squares of 2",
        ),
        (
            {"geometry": {**NATIVE, "max_pixels": 9}},
            "image.geometry.max_pixels: 9 is below min_pixels",
        ),
        (
            {"geometry": {**NATIVE, "grids": [[4, 4], [2, 2]]}},
            "image.tokens: expected 2 positive numbers, got [4]",
        ),
        (
            {"rules": {"background": [0, 0, 256]}},
            "image.rules.background: [0, 0, 256] is not a colour",
        ),
        (
            {"rules": {"sixteen_bit_divisor": 0}},
            "image.rules: the divisor and the bounds must be positive",
        ),
        (
            {"offsets": [[[0], [1]]]},
            "image.offsets: expected a row for each of [4] tokens, got [2]",
        ),
        (
            {"offsets": [[[0]] * 4] * 2},
            "image.offsets: expected a row for each of [4] tokens, got [4, 4]",
        ),
        (
            {"offsets": [[[0], [1], [2], [3, 4]]]},
            "image.offsets: expected rows of one length, got [1, 2]",
        ),
        ({"offsets": [[[]] * 4]}, "image.offsets: expected rows of one length, got [0]"),
        ({"offsets": [[[0], [1], [2], [1e400]]]}, "image.offsets: a number is not finite"),
        ({"offsets": [[0, 1, 2, 3]]}, "image.offsets[0][0]: expected a list, got 0"),
        ({"spans": []}, "image.spans: expected 1 positive numbers, got []"),
        ({"spans": [1, 1]}, "image.spans: expected 1 positive numbers, got [1.0, 1.0]"),
        ({"spans": [0]}, "image.spans: expected 1 positive numbers, got [0.0]"),
        ({"spans": [1e400]}, "image.spans: expected 1 positive numbers, got [inf]"),
        (
            {"rules": {"formats": ["TIFF"]}},
            "image.rules.formats: expected some of 'JPEG', 'PNG', 'WEBP', 'BMP', got ['TIFF']",
        ),
    ],
)
def test_a_wrong_section_is_the_bundles_fault(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError) as caught:
        ImageSpec.from_json({**SECTION, **change})
    assert str(caught.value) == f"manifest.json: {message}{HINT}"


def test_a_missing_key_is_named() -> None:
    with pytest.raises(BundleError) as caught:
        ImageSpec.from_json({key: value for key, value in SECTION.items() if key != "tokens"})
    assert str(caught.value) == f"manifest.json: image: missing key 'tokens'{HINT}"
