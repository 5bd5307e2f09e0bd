"""What a device file says is computed is: every scheme that a plan accepts, lowered and run.

All wishes of a recipe, one by one: where the plan refuses, nothing is asked of the exporter; where
it does not, the kernels that it leads to give the numbers of the module in torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from edgevlm.device import load_device
from edgevlm.model.quantized import QuantLinear
from edgevlm.quant.assign import Wishes, assign
from edgevlm.quant.options import SchemeOptions
from edgevlm.quant.rounding import quantized_linear
from edgevlm.quant.statistics import Statistics, wanted_of
from edgevlm_export.ops.quant_linear import OP
from tests.edgevlm.tiny import tiny_spec
from tests.export.running import lowered, seeded

ROWS, COLUMNS = 24, 80  # the last group is short for most sizes
CONSTANTS = ("weight", "scale", "zero", "bias", "x_scale", "x_zero")
TARGETS: dict[str, tuple[str, ...]] = {
    "ort": ("ort",),
    "static": ("static",),
    "both": ("ort", "static"),
    "tensorrt": ("tensorrt",),
}
DEVICES = dict.fromkeys(TARGETS, "host-cpu") | {"tensorrt": "jetson-thor"}
SCHEMES = ("w4a16", "w4a8", "w8a16", "w8a8", "w16a16", "fp8")


def wishes(scheme: str) -> Iterator[SchemeOptions]:
    """All that can be said of a scheme, but for how its numbers are found."""
    sizes: list[dict[str, object]] = [{}, {"per_channel": True}]
    sizes += [{"group_size": size} for size in (8, 16, 48, 64, 256)]
    for size, symmetric, scales in itertools.product(
        sizes, (True, False), (None, "token", "tensor", "block", "static")
    ):
        rounds_floats = scheme.endswith("a16")
        if (scales and rounds_floats) or (scheme == "fp8" and not symmetric):
            continue
        yield SchemeOptions.model_validate(
            {"scheme": scheme, "symmetric": symmetric, "activations": scales, **size}
        )


def module_of(wish: SchemeOptions, names: str, x: torch.Tensor) -> QuantLinear | None:
    """A map of that scheme, calibrated on the rows; None where the plan refuses it."""
    device = load_device(DEVICES[names])
    found = assign(Wishes(components={"vision": wish}), tiny_spec(), device, TARGETS[names])
    if any(decision.outcome == "refused" for decision in found.decisions):
        return None
    scheme = next(iter(found.schemes.values()))
    torch.manual_seed(0)
    statistics = Statistics("op", COLUMNS, wanted_of(scheme, wish, False))
    statistics.update(x)
    return quantized_linear(nn.Linear(COLUMNS, ROWS), scheme, wish, statistics, site="op")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("names", TARGETS)
def test_what_a_plan_accepts_is_computed(scheme: str, names: str) -> None:
    x = seeded(1, 6, COLUMNS)
    accepted = refused = 0
    for wish in wishes(scheme):
        module = module_of(wish, names, x)
        if module is None:
            refused += 1
            continue
        accepted += 1
        with torch.no_grad():
            want = module(x).numpy()
        weights, activations = module.scheme.weights, module.scheme.activations
        tensors = {"x": x} | {name: getattr(module, name) for name in CONSTANTS}
        tensors = {
            name: None if value is None else value.detach() for name, value in tensors.items()
        }
        attributes = {
            "bits": weights.bits,
            "group_size": weights.group_size,
            "x_dtype": "" if activations is None else activations.dtype,
            "x_scales": "" if activations is None else activations.scales,
        }
        # Activations of 16 bits stay float where there are no such kernels: half a step of each.
        sixteen = activations is not None and activations.dtype == "int16"
        for target in TARGETS[names]:
            dynamic = ["x"] if target == "ort" else []
            (got,) = lowered(
                OP, target, tensors, constants=CONSTANTS, dynamic=dynamic, **attributes
            )
            atol = 2e-4 if sixteen and target == "ort" else 2e-5
            np.testing.assert_allclose(got, want, atol=atol, rtol=0, err_msg=f"{wish} {target}")
    assert accepted + refused == len(list(wishes(scheme)))
    assert refused > 0
    nowhere = {("w16a16", "ort"), ("w16a16", "both"), ("fp8", "ort"), ("fp8", "both")}
    nowhere |= {(name, "tensorrt") for name in ("w4a8", "w8a16", "w16a16")}
    assert (accepted > 0) == ((scheme, names) not in nowhere)
