"""Bundles whose quantized parts do not fit: one clear error each, before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm_runtime import Bundle, BundleError, EngineError, Session
from edgevlm_runtime.errors import EdgeVlmError
from edgevlm_runtime.files import entry_of
from edgevlm_runtime.structure import to_json
from tests.runtime.bundles import write_toy
from tests.runtime.tables import quantized_bundle

AGAIN = "\n  hint: compile the bundle again"
OR_UPGRADE = f"{AGAIN}, or upgrade edgevlm-runtime"
OPTIONS = {"bits": "4", "block_size": "16"}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 400 rows of 32 numbers, 4 bits, in blocks of 16."""
    return quantized_bundle(tmp_path_factory.mktemp("clean") / "bundle", 4)[0]


@pytest.fixture
def bundle(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "bundle"))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change the default variant in the manifest."""
    manifest = path / "manifest.json"
    data = json.loads(manifest.read_text())
    change(data["variants"]["ort"])
    manifest.write_text(json.dumps(data))


def replace(path: Path, name: str, array: np.ndarray) -> None:
    """Another array in a file, listed as it is now."""
    np.save(path / name, array, allow_pickle=False)
    manifest = path / "manifest.json"
    data = json.loads(manifest.read_text())
    data["files"][name] = to_json(entry_of(path / name))
    manifest.write_text(json.dumps(data))


def refused(path: Path, kind: type[EdgeVlmError] = BundleError) -> str:
    with pytest.raises(kind) as error:
        Session(Bundle.open(path))
    return str(error.value)


def test_the_clean_one_opens(clean: Path) -> None:
    assert Session(Bundle.open(clean)).generate("what?").tokens


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS | {"bits": "3"},
        OPTIONS | {"bits": "-4"},
        OPTIONS | {"bits": "4.0"},
        OPTIONS | {"bits": "\u0664"},  # a digit four that is not one of ASCII
        OPTIONS | {"bits": "9" * 5000},
        OPTIONS | {"block_size": "0"},
        OPTIONS | {"block_size": "8"},
        OPTIONS | {"block_size": "24"},
        OPTIONS | {"block_size": "16 "},
        OPTIONS | {"threads": "2"},
        {"bits": "4"},
        {"block_size": "16"},
        {},
    ],
)
def test_options_that_mean_nothing(bundle: Path, options: dict[str, str]) -> None:
    edit(bundle, lambda variant: variant["graphs"][0]["engine"].update(options=options))
    assert refused(bundle) == (
        f"embedding 'embedding' has options {options}, not bits 4 or 8 and a block_size that is a "
        f"power of two from 16 on{OR_UPGRADE}"
    )


@pytest.mark.parametrize("weights", [[], ["scales.npy", "embedding.npy"]])
def test_scales_are_one_file(bundle: Path, weights: list[str]) -> None:
    edit(bundle, lambda variant: variant["graphs"][0].update(weights=weights))
    assert refused(bundle) == (
        f"embedding 'embedding' of 4 bits has {len(weights)} weight files, not one of scales{AGAIN}"
    )


def test_the_width_must_be_known(bundle: Path) -> None:
    def free(variant: Any) -> None:
        variant["graphs"][0]["outputs"][0]["shape"] = ["T", "W"]

    edit(bundle, free)
    message = f"embedding 'embedding' of 4 bits has no output of a fixed width{AGAIN}"
    assert refused(bundle) == message
    edit(bundle, lambda variant: variant["graphs"][0].update(outputs=[]))
    assert refused(bundle) == message


CODES, SCALES = "uint8 [400, 2, 8]", "float32 [400, 2]"


@pytest.mark.parametrize(
    ("name", "array", "found", "wanted"),
    [
        ("embedding.npy", np.zeros((400, 2, 9), np.uint8), "uint8 [400, 2, 9]", CODES),
        ("embedding.npy", np.zeros((400, 1, 8), np.uint8), "uint8 [400, 1, 8]", CODES),
        ("embedding.npy", np.zeros((400, 16), np.uint8), "uint8 [400, 16]", CODES),
        ("embedding.npy", np.zeros((400, 2, 8), np.int8), "int8 [400, 2, 8]", CODES),
        ("embedding.npy", np.zeros((), np.uint8), "uint8 []", "uint8 [0, 2, 8]"),
        ("scales.npy", np.zeros((400, 3), np.float32), "float32 [400, 3]", SCALES),
        ("scales.npy", np.zeros((399, 2), np.float32), "float32 [399, 2]", SCALES),
        ("scales.npy", np.zeros(800, np.float32), "float32 [800]", SCALES),
        ("scales.npy", np.zeros((400, 2), np.float16), "float16 [400, 2]", SCALES),
    ],
)
def test_files_of_other_sizes(
    bundle: Path, name: str, array: np.ndarray, found: str, wanted: str
) -> None:
    replace(bundle, name, array)
    assert refused(bundle) == (
        f"embedding file {name!r} is {found}, rows of 32 in blocks of 16 are {wanted}{AGAIN}"
    )


def test_altered_scales(bundle: Path) -> None:
    path = bundle / "scales.npy"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    assert refused(bundle).startswith("file 'scales.npy' was altered: sha256 ")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "plain")


def test_float8_that_is_not_of_state(plain: Path) -> None:
    """No host computes with it: a graph's other inputs and outputs are of other types."""

    def change(variant: Any) -> None:
        variant["graphs"][1]["outputs"][0]["dtype"] = "float8_e4m3fn"

    edit(plain, change)
    assert refused(plain) == (
        "manifest.json: variants.ort.graphs[vision]: 'image_embeds' is float8_e4m3fn, which only "
        f"state can be{OR_UPGRADE}"
    )


def test_state_of_another_dtype_than_its_output(plain: Path) -> None:
    """Both have bytes of the same size: the graph would read what it has not written."""

    def change(variant: Any) -> None:
        variant["state"][0]["tensors"][0]["dtype"] = "float8_e4m3fn"
        for tensor in variant["graphs"][2]["inputs"]:
            if tensor["source"] == "state:key.0":
                tensor["dtype"] = "float8_e4m3fn"
        for tensor in variant["graphs"][2]["outputs"]:
            if tensor["name"] == "new.key.0":
                tensor["dtype"] = "uint8"

    edit(plain, change)
    assert refused(plain) == (
        "manifest.json: variants.ort.graphs[step]: state 'key.0' is float8_e4m3fn, output "
        f"'new.key.0' is uint8{OR_UPGRADE}"
    )


@pytest.mark.parametrize("dtype", ["int8", "float8_e5m2"])
def test_state_of_another_dtype_than_its_graph(plain: Path, dtype: str) -> None:
    """A cache of a quarter of the bytes would be written past its end."""

    def change(variant: Any) -> None:
        variant["state"][0]["tensors"][0]["dtype"] = dtype
        for tensor in variant["graphs"][2]["inputs"] + variant["graphs"][2]["outputs"]:
            if tensor["name"].endswith("key.0"):
                tensor["dtype"] = dtype

    edit(plain, change)
    assert refused(plain, EngineError) == (
        "graph 'step' has input 'past.key.0' of float32 [1, 1, 64, 16], listed "
        f"{dtype} [1, 1, 64, 16]{AGAIN}, its manifest is of another graph"
    )
