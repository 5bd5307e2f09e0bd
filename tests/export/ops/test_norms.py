"""Norms: torch, numpy and ONNX Runtime agree in every lowering."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgevlm_export.ops.layer_norm import OP as LAYER_NORM
from edgevlm_export.ops.rms_norm import OP as RMS_NORM
from tests.export.running import eager, lowered, seeded

# Outputs of size 3 in float32: a few units in the last place.
TOLERANCE = 3e-6


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("target", ["ort", "static"])
def test_rms_norm(target: str, unit_offset: bool) -> None:
    tensors = {"x": seeded(2, 5, 48) * 3, "weight": seeded(48, seed=1)}
    options = {"eps": 1e-5, "unit_offset": unit_offset}
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    expected = RMS_NORM.numpy(**arrays, **options)
    np.testing.assert_allclose(eager(RMS_NORM, tensors, **options)[0], expected, atol=TOLERANCE)
    (out,) = lowered(RMS_NORM, target, tensors, constants=["weight"], **options)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", ["ort", "static"])
def test_layer_norm(target: str) -> None:
    tensors = {"x": seeded(2, 5, 48) * 3 + 1, "weight": seeded(48, seed=1), "bias": seeded(48)}
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    expected = LAYER_NORM.numpy(**arrays, eps=1e-6)
    np.testing.assert_allclose(eager(LAYER_NORM, tensors, eps=1e-6)[0], expected, atol=TOLERANCE)
    (out,) = lowered(LAYER_NORM, target, tensors, constants=["weight", "bias"], eps=1e-6)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", ["ort", "static"])
def test_epsilon_is_under_the_root(target: str) -> None:
    tensors = {"x": torch.full((1, 1, 16), 1e-4), "weight": torch.ones(16)}
    (out,) = lowered(RMS_NORM, target, tensors, eps=1e-6, unit_offset=False)
    expected = np.full((1, 1, 16), 1e-4 / np.sqrt(1e-8 + 1e-6))
    np.testing.assert_allclose(out, expected, rtol=1e-6)
