"""What the runtime loads, and its small command line, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgevlm_runtime
from edgevlm_runtime import Bundle, Session
from edgevlm_runtime.__main__ import main
from tests.runtime.bundles import write_toy

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "yaml", "pydantic", "onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "bundle", max_new_tokens=6)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "p.png"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def loaded(script: str) -> set[str]:
    """The top-level modules that a script has loaded at its end."""
    script += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_importing_everything_loads_nothing_heavy() -> None:
    modules = loaded("from edgevlm_runtime import *; import edgevlm_runtime.__main__")
    assert {"edgevlm_runtime", "numpy", "tokenizers", "PIL"} <= modules
    assert modules & set(HEAVY) == set()


def test_errors_and_types_do_not_wait_for_numpy() -> None:
    modules = loaded("import edgevlm_runtime.errors, edgevlm_runtime.manifest")
    assert modules & {*HEAVY, "numpy", "tokenizers", "PIL"} == set()


def test_answering_loads_the_engine_and_nothing_else(folder: Path) -> None:
    script = (
        "from edgevlm_runtime import Bundle, Session\n"
        f"Session(Bundle.open({str(folder)!r})).generate('what?')"
    )
    assert loaded(script) & set(HEAVY) == {"onnxruntime"}


def test_public_names() -> None:
    assert edgevlm_runtime.__all__ == sorted(edgevlm_runtime.__all__)
    for name in edgevlm_runtime.__all__:
        assert getattr(edgevlm_runtime, name) is not None
    with pytest.raises(AttributeError):
        _ = edgevlm_runtime.Sesion


def test_run_answers(folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = Session(Bundle.open(folder)).generate("what is it?", [picture])
    arguments = ["run", str(folder), "--prompt", "what is it?", "--image", str(picture)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == wanted.text + "\n"
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"] == wanted.text
    assert document["tokens"] == list(wanted.tokens)
    assert document["finish_reason"] == "length"
    assert len(document["timings"]["token_ms"]) == 5


def test_inspect_shows_what_is_inside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    assert capsys.readouterr().out == (
        "toy: toy (toy) for host-cpu\n"
        f"7 files, {size / 2**20:.1f} MiB, all as listed\n"
        "variant ort (default), target ort\n"
        "  embedding  embedding on table\n"
        "  vision     vision on ort\n"
        "  step       step on ort [prefill decode verify]\n"
        "  state      main: 64 slots\n"
        "variant static, target static\n"
        "  embedding  embedding on table\n"
        "  vision     vision on ort\n"
        "  step       step_1 on ort [decode verify]\n"
        "  step       step_4 on ort [decode verify]\n"
        "  step       step_16 on ort [prefill]\n"
        "  state      main: 64 slots\n"
    )
    assert main(["inspect", str(folder), "--json"]) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert json.loads(capsys.readouterr().out) == manifest


def test_errors_have_an_exit_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder / "none")]) == 5
    assert capsys.readouterr().err == (
        f"error: no bundle at '{folder / 'none'}'\n"
        "  hint: compile one: edgevlm compile RECIPE --out FOLDER\n"
    )
    assert main(["run", str(folder), "--prompt", "a", "--max-new-tokens", "0"]) == 2
    assert capsys.readouterr().err == "error: max_new_tokens must be at least 1, got 0\n"
