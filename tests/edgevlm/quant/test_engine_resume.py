"""Quantization that breaks off: the next run goes on where it was, and comes to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgevlm.model.quantized import QuantLinear
from edgevlm.model.vlm import Vlm
from edgevlm.progress import Silent
from edgevlm.quant import engine
from edgevlm.quant.calibrate import CalibrationCase
from tests.edgevlm.calibrated import context, quantized, samples_of
from tests.edgevlm.quant.units import UNITS, unit_of
from tests.edgevlm.tiny import drawn, tiny_spec


@pytest.fixture(scope="module")
def cases() -> list[CalibrationCase]:
    return samples_of(tiny_spec())


class StoppedError(Exception):
    """The run is over."""


class Breaking(Silent):
    """Progress that raises after so many units."""

    def __init__(self, units: int) -> None:
        self.units = units

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Any]:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if done == self.units:
                raise StoppedError

        yield advance


RESUMED = {
    "vision": {"scheme": "w8a8", "activations": "static"},
    "projector": {"scheme": "w4a16", "method": "gptq"},
    "decoder": {"scheme": "w4a16", "method": "gptq", "symmetric": False},
    "prefill": {"scheme": "w8a8", "activations": "static"},
    "head": "w8a16",
    "kv": "int8",
    "bias_correction": True,
}


@pytest.fixture(scope="module")
def whole(cases: list[CalibrationCase]) -> dict[str, Tensor]:
    """The tensors of a run that nothing interrupts."""
    model = drawn(tiny_spec())
    quantized(model, RESUMED, cases)
    return model.state_dict()


def run(cases: list[CalibrationCase], work: Path, units: int = 0) -> Vlm:
    """The pass with a work folder, which breaks off after so many units."""
    from edgevlm.passes import Quantize, run_pass

    model = drawn(tiny_spec())
    here = context(cases, work=work, progress=Breaking(units))
    run_pass(Quantize.model_validate(RESUMED), model, here)
    return model


@pytest.mark.parametrize("units", [1, 2, 3, 5, 7])
def test_an_interrupted_run_goes_on_at_the_unit_it_reached(
    cases: list[CalibrationCase],
    whole: dict[str, Tensor],
    units: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(StoppedError):
        run(cases, tmp_path, units)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{unit}.safetensors" for unit in UNITS[:units]
    )
    again: list[str] = []
    original = engine.quantized_linear

    def noted(*arguments: Any, site: str) -> QuantLinear:
        again.append(site)
        return original(*arguments, site=site)

    monkeypatch.setattr(engine, "quantized_linear", noted)
    model = run(cases, tmp_path)
    assert {unit_of(site) for site in again} == set(UNITS[units:])
    assert_same(model.state_dict(), whole)


def test_a_unit_that_was_not_finished_is_done_again(
    cases: list[CalibrationCase],
    whole: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It breaks off within a unit, and half a file lies there."""
    original = engine.quantized_linear

    def broken(*arguments: Any, site: str) -> QuantLinear:
        if site == "decoder.layers.0.mlp.up":
            raise StoppedError
        return original(*arguments, site=site)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "quantized_linear", broken)
        with pytest.raises(StoppedError):
            run(cases, tmp_path)
    (tmp_path / "decoder.layers.0.part").write_bytes(b"half")
    assert not (tmp_path / "decoder.layers.0.safetensors").exists()
    assert_same(run(cases, tmp_path).state_dict(), whole)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
