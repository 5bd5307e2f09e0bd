"""Engines: options, graphs that do not fit their manifest, and what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edgevlm_runtime import Bundle, BundleError, EngineError, Session
from edgevlm_runtime.engine import Engines
from tests.runtime.bundles import vision_weights, write_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "bundle")


def with_graph(folder: Path, **changes: object) -> Bundle:
    """The bundle with changes to the manifest's entry of the vision graph."""
    path = folder / "manifest.json"
    original = path.read_text()
    data = json.loads(original)
    data["variants"]["ort"]["graphs"][1].update(changes)
    path.write_text(json.dumps(data))
    try:
        return Bundle.open(folder)
    finally:
        path.write_text(original)


def refused(bundle: Bundle) -> str:
    with pytest.raises(EngineError) as error:
        Engines(bundle).open(bundle.variant.graphs[1])
    return str(error.value)


def test_a_bound_call_reads_and_writes_in_place(folder: Path) -> None:
    bundle = Bundle.open(folder)
    engine = Engines(bundle).open(bundle.variant.graphs[1])
    pixels = np.zeros((1, 3, 8, 8), np.float32)
    rows = np.full((1, 4, 32), 9, np.float32)
    call = engine.bind({"pixels": pixels}, {"image_embeds": rows})
    assert call.run()["image_embeds"] is rows
    assert (rows == 0).all()
    pixels[...] = np.random.default_rng(0).random(pixels.shape)
    call.run()
    wanted = pixels.reshape(4, 48).astype(np.float64) @ vision_weights()
    # Sums of 48 float32 products of about 0.1.
    np.testing.assert_allclose(rows[0], wanted, atol=1e-5, rtol=0)
    made = engine.bind({"pixels": pixels}, {"image_embeds": None}).run()["image_embeds"]
    np.testing.assert_array_equal(made, rows)


def test_wrong_input_is_one_error(folder: Path) -> None:
    bundle = Bundle.open(folder)
    engine = Engines(bundle).open(bundle.variant.graphs[1])
    call = engine.bind({"pixels": np.zeros((1, 3, 8, 9), np.float32)}, {"image_embeds": None})
    with pytest.raises(EngineError, match=r"^graph 'vision' cannot be run: "):
        call.run()


def test_engines_and_options_that_are_not_known(folder: Path) -> None:
    assert refused(with_graph(folder, engine={"kind": "rknn"})) == (
        "graph 'vision' wants engine 'rknn', this runtime has 'ort'\n"
        "  hint: upgrade edgevlm-runtime, or compile for a target that it runs"
    )
    for options in ({"threads": "2"}, {"intra_op_num_threads": "-1"}):
        ((name, value),) = options.items()
        assert refused(with_graph(folder, engine={"kind": "ort", "options": options})) == (
            f"graph 'vision' has engine option {name!r} = {value!r}, which the engine 'ort' does "
            "not know\n  hint: compile the bundle again, or upgrade edgevlm-runtime"
        )


def test_options_reach_the_session(folder: Path) -> None:
    options = {"graph_optimization_level": "basic", "session.intra_op.allow_spinning": "0"}
    bundle = with_graph(folder, engine={"kind": "ort", "options": options})
    engine = Engines(bundle).open(bundle.variant.graphs[1])
    set_options = engine._session.get_session_options()  # type: ignore[attr-defined]
    assert set_options.graph_optimization_level == (
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    )
    assert set_options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "image"}, "graph 'vision' has an input 'pixels' unlisted"),
        (
            {"shape": [1, 3, 8, 9]},
            "graph 'vision' has input 'pixels' of float32 [1, 3, 8, 8], listed float32 "
            "[1, 3, 8, 9]",
        ),
        (
            {"shape": [1, 3, 64]},
            "graph 'vision' has input 'pixels' of float32 [1, 3, 8, 8], listed float32 [1, 3, 64]",
        ),
        (
            {"dtype": "float16"},
            "graph 'vision' has input 'pixels' of float32 [1, 3, 8, 8], listed float16 "
            "[1, 3, 8, 8]",
        ),
    ],
)
def test_manifest_and_graph_must_agree(
    folder: Path, change: dict[str, object], message: str
) -> None:
    spec = {"name": "pixels", "dtype": "float32", "shape": [1, 3, 8, 8], "source": "pixels"}
    assert refused(with_graph(folder, inputs=[spec | change])) == (
        f"{message}\n  hint: compile the bundle again, its manifest is of another graph"
    )


def test_outputs_must_be_there(folder: Path) -> None:
    spec = {"name": "rows", "dtype": "float32", "shape": [1, 4, 32], "source": ""}
    assert refused(with_graph(folder, outputs=[spec])) == (
        "graph 'vision' has no output 'rows'\n"
        "  hint: compile the bundle again, its manifest is of another graph"
    )


def test_a_bundle_without_a_table(folder: Path) -> None:
    path = folder / "manifest.json"
    original = path.read_text()
    data = json.loads(original)
    del data["variants"]["ort"]["graphs"][0]
    path.write_text(json.dumps(data))
    try:
        with pytest.raises(BundleError) as error:
            Session(Bundle.open(folder))
    finally:
        path.write_text(original)
    assert str(error.value) == (
        "variant 'ort' has no graph of role 'embedding'\n  hint: compile the bundle again"
    )


def test_without_onnxruntime_the_extra_is_named(folder: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['onnxruntime'] = None\n"
        "from edgevlm_runtime import Bundle, EngineError, Session\n"
        "try:\n"
        f"    Session(Bundle.open({str(folder)!r}))\n"
        "except EngineError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == (
        'onnxruntime is not installed\n  hint: pip install "edgevlm-runtime[cpu]"\n'
    )
