"""What linear maps are given while a part of the model runs on the calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from edgevlm.errors import PassError
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes.base import Context
from edgevlm.quant.calibrate import CalibrationCase

__all__ = ["Observer", "Run", "drawn_cases", "observe"]

Run = Callable[[], object]
"""Runs a part of the model on all calibration samples."""


class Observer(Protocol):
    """A running record of inputs."""

    def update(self, x: Tensor, /) -> None:
        """Record a batch [..., K]."""
        ...


def observe(model: Vlm, observers: Mapping[str, Observer], run: Run) -> None:
    """Show observers what the linear maps at their sites are given in a run."""
    handles = [
        model.get_submodule(site).register_forward_pre_hook(
            lambda _module, inputs, seen=seen: seen.update(inputs[0])
        )
        for site, seen in observers.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def drawn_cases(
    context: Context, spec: VlmSpec, *, name: str, site: str
) -> Sequence[CalibrationCase]:
    """The calibration samples of a context; raises PassError of the pass `name` without any."""
    cases = context.calibration(spec) if context.calibration is not None else ()
    if not cases:
        raise PassError(
            "it is calibrated, and there are no calibration samples",
            name=name,
            site=site,
            hint="name a folder in calibration.data, or leave it out for the picture world",
        )
    return cases
