"""Bundles that somebody has tampered with: one clear error each, and no parser sees a byte."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from edgevlm_runtime import Bundle, BundleError, EdgeVlmError, EngineError, ResourceError, Session
from edgevlm_runtime.files import MAX_MANIFEST_BYTES
from tests.runtime.bundles import write_toy

AGAIN = "\n  hint: copy or compile the bundle again"
PLAIN_FILES = "\n  hint: a bundle holds plain files only; compile it again"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("clean") / "bundle")


@pytest.fixture
def bundle(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "bundle"))


def refused(path: Path, kind: type[EdgeVlmError] = BundleError) -> str:
    with pytest.raises(kind) as error:
        Session(Bundle.open(path))
    return str(error.value)


def edit(path: Path, **changes: Any) -> None:
    """Change top-level keys of the manifest."""
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


def relist(path: Path, name: str) -> None:
    """List a file as it is now, as an attacker would who writes the whole bundle."""
    manifest = path / "manifest.json"
    data = json.loads(manifest.read_text())
    content = (path / name).read_bytes()
    data["files"][name] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    manifest.write_text(json.dumps(data))


def test_no_bundle(tmp_path: Path) -> None:
    assert refused(tmp_path / "x") == (
        f"no bundle at '{tmp_path / 'x'}'\n  hint: compile one: edgevlm compile RECIPE --out FOLDER"
    )
    assert refused(tmp_path) == (
        f"'{tmp_path}' is no bundle, it has no manifest.json\n"
        "  hint: give the folder that `edgevlm compile` wrote"
    )


def test_missing_file(bundle: Path) -> None:
    (bundle / "vision.onnx").unlink()
    assert refused(bundle) == f"file 'vision.onnx' is missing from '{bundle}'" + AGAIN


def test_altered_file(bundle: Path) -> None:
    path = bundle / "step.onnx"
    data = bytearray(path.read_bytes())
    listed = hashlib.sha256(data).hexdigest()
    data[100] ^= 1
    path.write_bytes(data)
    found = hashlib.sha256(data).hexdigest()
    assert refused(bundle) == (
        f"file 'step.onnx' was altered: sha256 {found}, listed {listed}" + AGAIN
    )


@pytest.mark.parametrize("change", [-1, 1])
def test_truncated_or_longer_file(bundle: Path, change: int) -> None:
    path = bundle / "embedding.npy"
    size = path.stat().st_size
    os.truncate(path, size + change)
    assert (
        refused(bundle) == f"file 'embedding.npy' has {size + change} bytes, listed {size}" + AGAIN
    )


def test_symbolic_link(bundle: Path, tmp_path: Path) -> None:
    (bundle / "step.onnx").rename(tmp_path / "elsewhere")
    (bundle / "step.onnx").symlink_to(tmp_path / "elsewhere")
    assert refused(bundle) == (
        "file 'step.onnx' of the bundle is reached by a symbolic link" + PLAIN_FILES
    )


def test_symbolic_link_to_a_folder(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (bundle / "step.onnx").rename(outside / "step.onnx")
    (bundle / "graphs").symlink_to(outside)
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace('"step.onnx"', '"graphs/step.onnx"'))
    assert refused(bundle) == (
        "file 'graphs' is not listed in manifest.json\n"
        "  hint: remove it: what a bundle does not list could be loaded unchecked"
    )


def test_linked_manifest(bundle: Path, tmp_path: Path) -> None:
    (bundle / "manifest.json").rename(tmp_path / "m")
    (bundle / "manifest.json").symlink_to(tmp_path / "m")
    assert refused(bundle) == (
        "file 'manifest.json' of the bundle is reached by a symbolic link" + PLAIN_FILES
    )


def test_hard_link(bundle: Path, tmp_path: Path) -> None:
    os.link(bundle / "step.onnx", tmp_path / "second_name")
    assert refused(bundle) == (
        "file 'step.onnx' of the bundle is a hard link (2 names)\n"
        "  hint: copy the bundle with its files, not with links"
    )


def test_not_a_regular_file(bundle: Path) -> None:
    (bundle / "step.onnx").unlink()
    os.mkfifo(bundle / "step.onnx")
    assert refused(bundle) == "file 'step.onnx' of the bundle is not a regular file" + PLAIN_FILES


@pytest.mark.parametrize(
    "name",
    ["../step.onnx", "/etc/passwd", "a/../../x", "", "./x", "a//b", "a\\b", "c:x", "a\nb", "a\0b"],
)
def test_unsafe_names(bundle: Path, name: str) -> None:
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit(bundle, files=files | {name: {"size": 1, "sha256": "0" * 64}})
    assert refused(bundle) == f"unsafe file name {name!r} in manifest.json" + PLAIN_FILES


def test_unlisted_file(bundle: Path) -> None:
    (bundle / "more").mkdir()
    (bundle / "more" / "weights.bin").write_bytes(b"x")
    assert refused(bundle) == (
        "file 'more/weights.bin' is not listed in manifest.json\n"
        "  hint: remove it: what a bundle does not list could be loaded unchecked"
    )


@pytest.mark.parametrize("location", ["../secret.bin", "/SECRET", "sub/../../secret.bin"])
def test_weights_outside_the_bundle(bundle: Path, tmp_path: Path, location: str) -> None:
    """A graph that names a file elsewhere, hashed and listed as it is: nothing of it is read."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(4 * 48 * 32))
    location = location.replace("/SECRET", str(secret))
    model = onnx.load(bundle / "vision.onnx")
    tensor = next(item for item in model.graph.initializer if list(item.dims) == [48, 32])
    onnx.external_data_helper.set_external_data(tensor, location, length=4 * 48 * 32)
    tensor.ClearField("raw_data")
    (bundle / "vision.onnx").write_bytes(model.SerializeToString())
    relist(bundle, "vision.onnx")
    message = refused(bundle, EngineError)
    assert message.startswith("onnxruntime ")
    assert "cannot load graph 'vision'" in message
    assert "External data path" in message


def test_newer_and_older_format(bundle: Path) -> None:
    edit(bundle, format_version=3, something_new={})
    assert refused(bundle) == (
        "bundle has format version 3, this runtime reads version 1\n"
        "  hint: upgrade edgevlm-runtime, or compile the bundle again"
    )
    edit(bundle, format_version=0)
    assert refused(bundle) == (
        "bundle has format version 0, this runtime reads version 1\n"
        "  hint: compile the bundle again"
    )


def test_unknown_variant(bundle: Path) -> None:
    with pytest.raises(BundleError) as error:
        Bundle.open(bundle, "npu")
    assert str(error.value) == ("bundle 'toy' has no variant 'npu'\n  hint: it has 'ort', 'static'")


def test_oversized_manifest(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", MAX_MANIFEST_BYTES + 1)
    assert refused(bundle) == (
        f"manifest.json has {MAX_MANIFEST_BYTES + 1} bytes, the limit is {MAX_MANIFEST_BYTES}"
        + AGAIN
    )


def test_oversized_state(bundle: Path) -> None:
    """Sizes that no machine has are refused before anything is allocated."""
    variants = json.loads((bundle / "manifest.json").read_text())["variants"]
    for tensor in variants["ort"]["state"][0]["tensors"]:
        tensor["shape"][2] = 2**40
    for tensor in variants["ort"]["graphs"][2]["inputs"]:
        if tensor["source"].startswith("state:"):
            tensor["shape"][2] = 2**40
    edit(bundle, variants=variants)
    present = (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) >> 20
    assert refused(bundle, ResourceError) == (
        f"the decoder's state needs {4 * 2**40 * 16 * 4 >> 20} MiB, this machine has {present} MiB"
        "\n  hint: compile with a smaller context"
    )


def test_manifest_of_another_graph(bundle: Path) -> None:
    """A state smaller than the graph's would be written past its end."""
    text = (bundle / "manifest.json").read_text()
    data = json.loads(text)
    for graph in data["variants"]["ort"]["graphs"]:
        for tensor in graph["inputs"] + graph["outputs"]:
            if tensor["name"].endswith("key.0"):
                tensor["shape"][2] = 8
    data["variants"]["ort"]["state"][0]["tensors"][0]["shape"][2] = 8
    edit(bundle, variants=data["variants"])
    assert refused(bundle, EngineError) == (
        "graph 'step' has input 'past.key.0' of float32 [1, 1, 64, 16], listed float32 "
        "[1, 1, 8, 16]\n  hint: compile the bundle again, its manifest is of another graph"
    )


def test_state_smaller_than_its_graph(bundle: Path) -> None:
    """The same, where the graph's own entry is right and only the state's shape is not."""
    variants = json.loads((bundle / "manifest.json").read_text())["variants"]
    variants["ort"]["state"][0]["tensors"][0]["shape"][2] = 8
    edit(bundle, variants=variants)
    assert refused(bundle) == (
        "manifest.json: variants.ort.graphs[step]: state 'key.0' is float32 [1, 1, 8, 16], "
        "input 'past.key.0' takes float32 [1, 1, 64, 16]\n"
        "  hint: compile the bundle again, or upgrade edgevlm-runtime"
    )


def test_logits_that_are_not_numbers(bundle: Path) -> None:
    model = onnx.load(bundle / "step.onnx")
    head = next(item for item in model.graph.initializer if list(item.dims) == [32, 400])
    weights = numpy_helper.to_array(head).copy()
    weights[:, 17] = np.nan
    head.CopyFrom(numpy_helper.from_array(weights, head.name))
    (bundle / "step.onnx").write_bytes(model.SerializeToString())
    relist(bundle, "step.onnx")
    session = Session(Bundle.open(bundle))
    with pytest.raises(EngineError) as error:
        session.generate("what?")
    assert str(error.value) == (
        "the model gave nan as a logit (token 17)\n"
        "  hint: check the bundle with edgevlm inspect, or compile it without low precision"
    )


def test_table_that_is_not_a_plain_array(bundle: Path) -> None:
    path = bundle / "embedding.npy"
    path.write_bytes(b"\x80\x04" + bytes(300))
    relist(bundle, "embedding.npy")
    assert refused(bundle).startswith("file 'embedding.npy' is not an array: ")
    np.save(path, np.zeros((5, 32), np.float32).T)
    relist(bundle, "embedding.npy")
    assert refused(bundle) == (
        "file 'embedding.npy' is not a plain array of float32 [32, 5]\n"
        "  hint: compile the bundle again"
    )
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 32), }"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"cos\n")
    relist(bundle, "embedding.npy")
    assert refused(bundle) == (
        "file 'embedding.npy' is not a plain array of object [2, 32]\n"
        "  hint: compile the bundle again"
    )


def test_graph_that_is_not_a_graph(bundle: Path) -> None:
    (bundle / "step.onnx").write_bytes(b"not a graph")
    relist(bundle, "step.onnx")
    message = refused(bundle, EngineError)
    assert "cannot load graph 'step'" in message
    assert message.endswith(
        "\n  hint: compile the bundle again for this version, or install the one it names"
    )


@pytest.fixture(scope="module")
def target(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose files are altered and mended again."""
    return Path(shutil.copytree(clean, tmp_path_factory.mktemp("flips") / "bundle"))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_every_flipped_byte_is_found(target: Path, data: st.DataObject) -> None:
    names = sorted(path.name for path in target.iterdir() if path.name != "manifest.json")
    path = target / data.draw(st.sampled_from(names))
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    flip = data.draw(st.integers(1, 255))
    path.write_bytes(original[:place] + bytes([original[place] ^ flip]) + original[place + 1 :])
    try:
        with pytest.raises(BundleError, match=rf"^file '{path.name}' was altered: "):
            Bundle.open(target).check()
    finally:
        path.write_bytes(original)


def move_weights_out(bundle: Path) -> None:
    """Give the vision graph's weights a file of their own, `w.bin`, that the manifest lists."""
    model = onnx.load(bundle / "vision.onnx")
    (bundle / "vision.onnx").unlink()
    onnx.save(
        model,
        bundle / "vision.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=64,
    )
    relist(bundle, "vision.onnx")
    relist(bundle, "w.bin")


def test_altered_weights_in_a_file_of_their_own(bundle: Path) -> None:
    """They are hashed while the graph is loaded, and no session comes of it."""
    move_weights_out(bundle)
    variants = json.loads((bundle / "manifest.json").read_text())["variants"]
    for variant in variants.values():
        variant["graphs"][1]["weights"] = ["w.bin"]
    edit(bundle, variants=variants)
    session = Session(Bundle.open(bundle))
    assert session.generate("what?", [np.zeros((8, 8, 3), np.uint8)], max_new_tokens=1).tokens

    content = bytearray((bundle / "w.bin").read_bytes())
    listed = hashlib.sha256(content).hexdigest()
    content[1000] ^= 64
    (bundle / "w.bin").write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    message = f"file 'w.bin' was altered: sha256 {found}, listed {listed}" + AGAIN
    assert refused(bundle) == message
    with pytest.raises(BundleError) as error:
        Bundle.open(bundle).check()
    assert str(error.value) == message


def test_weights_that_no_graph_names_cannot_be_reached(bundle: Path) -> None:
    """A graph without weights in the manifest cannot read a file of the bundle either."""
    move_weights_out(bundle)
    assert "cannot load graph 'vision'" in refused(bundle, EngineError)
