"""HQQ against its loop in float64, and against what it begins with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgevlm.quant.hqq import NORM, hqq
from edgevlm.quant.ranges import RangeMethod
from edgevlm.quant.rtn import rtn
from tests.edgevlm.quant import slow
from tests.edgevlm.quant.slow import Floats


def fitted(group: Floats, bits: int, symmetric: bool) -> tuple[float, float, float]:
    """The least loss of all rounds, with its scale and zero."""
    low, high = slow.limits(bits)
    scale, zero = slow.minmax_grid(group, bits, symmetric)
    best = (np.inf, scale, zero)
    beta = 10.0
    for _ in range(21):
        q = np.array([slow.round_to(w / scale, zero, bits) for w in group])
        error = group / scale - (q - zero)
        size = np.maximum(np.abs(error), 1e-6)
        loss = float((size**NORM).sum()) * scale**NORM
        if loss < best[0]:
            best = (loss, scale, zero)
        shrunk = np.sign(error) * np.maximum(size - size ** (NORM - 1) / beta, 0.0)
        target = group / scale - shrunk
        if not symmetric:
            zero = float(min(max(np.round((q - target).mean()), low), high))
        v = q - zero
        ratio = float(target @ v) / max(float(v @ v), 1.0)
        scale = scale * ratio if ratio > 0 else scale
        beta *= 1.01
    return best


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("bits", [3, 4])
def test_fits_as_a_loop_does(bits: int, group_size: int, symmetric: bool) -> None:
    weight = slow.drawn_weight(6, 40)
    tensor = hqq(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    for row in range(6):
        for group, span in enumerate(slow.groups_of(40, group_size)):
            loss, scale, zero = fitted(slow.float64(weight)[row, span], bits, symmetric)
            # Powers and twenty rounds of sums in float32.
            assert float(tensor.scale[row, group]) == pytest.approx(scale, rel=1e-4)
            assert tensor.zero is None or int(tensor.zero[row, group]) == zero
            assert losses(weight, tensor.dequantize())[row, span].sum() == pytest.approx(
                loss, rel=1e-3
            )


def losses(weight: Tensor, meant: Tensor) -> Floats:
    return np.asarray(np.abs(slow.float64(weight - meant)) ** NORM)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(2, 8),
    st.sampled_from([0, 8, 12]),
    st.booleans(),
    st.sampled_from(["minmax", "percentile", "mse", "mse_signed"]),
    st.integers(0, 10**6),
)
def test_no_group_gets_worse(
    bits: int, group_size: int, symmetric: bool, ranges: RangeMethod, seed: int
) -> None:
    weight = slow.drawn_weight(5, 32, seed)
    weight[0, :20] = 0.0
    before = rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric, ranges=ranges)
    after = hqq(weight, bits=bits, group_size=group_size, symmetric=symmetric, ranges=ranges)
    for span in slow.groups_of(32, group_size):
        was = losses(weight, before.dequantize())[:, span].sum(axis=1)
        now = losses(weight, after.dequantize())[:, span].sum(axis=1)
        # Errors below a millionth of a step count as such.
        assert (now <= was * (1 + 1e-4) + 1e-3).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gains_something(symmetric: bool) -> None:
    weight = slow.drawn_weight(16, 96)
    before = rtn(weight, bits=4, group_size=0, symmetric=symmetric)
    after = hqq(weight, bits=4, group_size=0, symmetric=symmetric)
    was, now = losses(weight, before.dequantize()).sum(), losses(weight, after.dequantize()).sum()
    assert now < 0.95 * was


def test_the_size_of_the_weights_does_not_matter() -> None:
    weight = slow.drawn_weight(6, 40)
    plain = hqq(weight, bits=4, group_size=16, symmetric=False)
    small = hqq(weight * 2.0**-12, bits=4, group_size=16, symmetric=False)
    np.testing.assert_array_equal(plain.values, small.values)
    np.testing.assert_array_equal(plain.scale * 2.0**-12, small.scale)
