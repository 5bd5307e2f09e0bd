"""Smoothing: the paper's formula, exact in floats, and better in integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgevlm.quant.ranges import affine_of
from edgevlm.quant.rtn import rtn
from edgevlm.quant.smooth import smooth_scales
from tests.edgevlm.quant import slow


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_is_the_papers_formula(alpha: float) -> None:
    weights = [slow.drawn_weight(8, 20), slow.drawn_weight(5, 20, seed=3)]
    absmax = slow.drawn_inputs(50, 20).abs().amax(dim=0)
    got = smooth_scales(absmax, weights, alpha=alpha)
    for channel in range(20):
        most = max(float(weight[:, channel].abs().max()) for weight in weights)
        want = float(absmax[channel]) ** alpha / most ** (1 - alpha)
        assert float(got[channel]) == pytest.approx(want, rel=1e-6)


def test_channels_without_input_or_weight_stay() -> None:
    weight = slow.drawn_weight(4, 6)
    weight[:, 2] = 0.0
    absmax = torch.tensor([1.0, 0.0, 3.0, 4.0, 1e30, 1e-30])
    scale = smooth_scales(absmax, [weight])
    assert scale[1] == scale[2] == 1.0
    assert scale.tolist()[4:] == [pytest.approx(1e5), pytest.approx(1e-5)]
    with pytest.raises(ValueError, match=r"^alpha 1.5 is not within 0 to 1$"):
        smooth_scales(absmax, [weight], alpha=1.5)


def test_int8_products_get_closer() -> None:
    weight, x = slow.drawn_weight(16, 48), slow.drawn_inputs(100, 48)
    x[:, 7] *= 60.0
    scale = smooth_scales(x.abs().amax(dim=0), [weight])

    def product(weight: torch.Tensor, x: torch.Tensor) -> np.ndarray:
        step, zero = affine_of(float(x.min()), float(x.max()), bits=8, symmetric=False)
        rounded = ((x / step).round() + zero).clamp(-128, 127).sub(zero) * step
        tensor = rtn(weight, bits=8, group_size=0, symmetric=True)
        return slow.float64(rounded) @ slow.float64(tensor.dequantize()).T

    want = slow.float64(x) @ slow.float64(weight).T
    plain = np.linalg.norm(product(weight, x) - want)
    assert np.linalg.norm(product(weight * scale, x / scale) - want) < 0.3 * plain
    # In floats nothing changes but the last bits.
    exact = slow.float64(x / scale) @ slow.float64(weight * scale).T
    np.testing.assert_allclose(exact, want, atol=1e-5 * np.abs(want).max())
