"""Norms against plain formulas in float64."""

from __future__ import annotations

import numpy as np
import torch

from edgevlm.model.norms import HeadNorm, build_norm
from edgevlm.model.spec import NormSpec

X = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.linspace(0.5, 1.5, 12)


def test_rms_norm() -> None:
    norm = build_norm(12, NormSpec(kind="rms", eps=0.1))
    norm.weight.data = WEIGHT
    x = X.double().numpy()
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * WEIGHT.numpy()
    np.testing.assert_allclose(norm(X).detach(), expected, atol=1e-6)  # float32 rounding


def test_layer_norm() -> None:
    norm = build_norm(12, NormSpec(kind="layer", eps=0.1))
    norm.load_state_dict({"weight": WEIGHT, "bias": WEIGHT - 1})
    x = X.double().numpy()
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 0.1)
    expected = centred / deviation * WEIGHT.numpy() + WEIGHT.numpy() - 1
    np.testing.assert_allclose(norm(X).detach(), expected, atol=1e-6)  # float32 rounding


def test_head_norm_takes_each_head_alone() -> None:
    norm = HeadNorm(4, NormSpec(kind="rms", eps=0.1))
    norm.weight.data = WEIGHT[:4]
    x = X.double().numpy()
    for head in range(3):
        part = x[..., 4 * head : 4 * head + 4]
        expected = part / np.sqrt((part**2).mean(-1, keepdims=True) + 0.1) * WEIGHT[:4].numpy()
        ours = norm(X).detach()[..., 4 * head : 4 * head + 4]
        np.testing.assert_allclose(ours, expected, atol=1e-6)  # float32 rounding
