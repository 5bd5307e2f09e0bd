"""The doctor: what it finds here, and what it says of machines that lack something."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys

import jsonschema
import pytest

from edgevlm import doctor
from edgevlm.cli import run
from edgevlm.doctor import examine
from edgevlm.resources import schema_file


def test_this_machine_is_well() -> None:
    found = examine()
    assert [(trial.name, trial.works) for trial in found.trials] == [
        ("compiler", True),
        ("engine ort", True),
        ("target ort", True),
        ("target static", True),
    ]
    packages = {package.name: package for package in found.packages}
    assert packages["torch"].extra == "compile"
    assert packages["onnxruntime"].installed == importlib.metadata.version("onnxruntime")
    assert found.machine.cores >= 1
    assert 0 < found.machine.available_bytes <= found.machine.memory_bytes


def test_json_keeps_its_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, json.loads(schema_file("doctor").read_text()))


def test_what_is_missing_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str | None:
        return {"onnx": None, "torch": "2.13.0+cpu", "typer": "0.1"}.get(name, found(name))

    found = doctor._version
    monkeypatch.setattr(doctor, "_version", version)
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    examination = examine()
    status = {package.name: package.status for package in examination.packages}
    assert status["onnx"] == "missing"
    assert status["torch"] == "ok"  # a build of the tested version
    assert status["typer"] == "untested"
    trials = {trial.name: trial for trial in examination.trials}
    assert not trials["target ort"].works
    assert trials["target ort"].detail == "onnx is not installed"
    assert (
        "onnx to compile: pip install torch==2.13.0 && pip install -c constraints.txt "
        '"edgevlm[compile]"'
    ) in examination.advice


@pytest.mark.parametrize(
    ("flags", "is_told"),
    [("fma avx2", False), ("avx2 avx_vnni", True), ("avx2 avx512_vnni", True)],
)
def test_a_processor_with_vnni_is_told_of_its_device(
    monkeypatch: pytest.MonkeyPatch, flags: str, is_told: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "_proc", lambda name: {"flags": flags})
    told = (
        "this processor multiplies 8-bit weights exactly: `device: x86-vnni` in a recipe keeps all "
        "their bits where host-cpu keeps 7"
    )
    assert (told in examine().advice) == is_told


def test_two_builds_of_onnxruntime_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: "1.31.1" if name == "onnxruntime-gpu" else found(name)
    )
    assert (
        "onnxruntime and onnxruntime-gpu overwrite each other's files: uninstall both, then "
        "install the one you want"
    ) in examine().advice


def test_an_engine_that_computes_wrongly_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import onnxruntime

    class Wrong:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def run(self, *_: object) -> list[object]:
            return [np.full((2, 4), 7.0, np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    trial = next(trial for trial in examine().trials if trial.name == "target static")
    assert not trial.works
    assert trial.detail.startswith("ArithmeticError: opset 19 in float32 is wrong by ")
    assert trial.hint == "reinstall onnxruntime in the tested version"
