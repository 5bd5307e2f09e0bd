"""Activations and gates: torch, numpy and ONNX Runtime agree in every lowering."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgevlm_export.ops.activate import ACTIVATIONS, numpy_activate
from edgevlm_export.ops.activate import OP as ACTIVATE
from edgevlm_export.ops.gated import OP as GATED
from tests.export.running import eager, lowered, seeded

# Values up to 10 in float32; ONNX Runtime's exponential is a polynomial of that accuracy.
TOLERANCE = 2e-6


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("target", ["ort", "static"])
def test_activate(kind: str, target: str) -> None:
    tensors = {"x": torch.linspace(-10, 10, 401).reshape(1, 401, 1)}
    expected = ACTIVATE.numpy(tensors["x"].double().numpy(), kind)
    np.testing.assert_allclose(eager(ACTIVATE, tensors, kind=kind)[0], expected, atol=TOLERANCE)
    (out,) = lowered(ACTIVATE, target, tensors, kind=kind)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("target", ["ort", "static"])
def test_gated(kind: str, target: str) -> None:
    tensors = {"gate": seeded(2, 3, 16), "up": seeded(2, 3, 16, seed=1)}
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    expected = GATED.numpy(**arrays, kind=kind)
    np.testing.assert_allclose(eager(GATED, tensors, kind=kind)[0], expected, atol=TOLERANCE)
    (out,) = lowered(GATED, target, tensors, kind=kind)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)


def test_the_two_gelus_are_two() -> None:
    exact = 0.5 * (1 + math.erf(math.sqrt(0.5)))
    assert numpy_activate(np.array([1.0]), "gelu")[0] == pytest.approx(exact, abs=1e-12)
    assert abs(numpy_activate(np.array([1.0]), "gelu_tanh")[0] - exact) > 1e-4
