"""Scales and ranges against definitions in float64, loop by loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgevlm.errors import PassError
from edgevlm.quant.affine import quantize
from edgevlm.quant.ranges import (
    NUM_BINS,
    ActivationRange,
    RangeMethod,
    affine_of,
    check_finite,
    weight_scales,
)
from tests.edgevlm.quant import slow


def errors_of(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    method: RangeMethod,
    counts: Tensor | None = None,
) -> np.ndarray:
    """The squared error of every group, columns weighted by `counts`."""
    scale, zero = weight_scales(
        weight,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        method=method,
        importance=counts,
    )
    tensor = quantize(weight, scale, zero, bits=bits, group_size=group_size)
    off = slow.float64(weight - tensor.dequantize()) ** 2
    if counts is not None:
        off *= slow.float64(counts)
    spans = slow.groups_of(weight.shape[1], group_size)
    return np.stack([off[:, span].sum(axis=1) for span in spans], axis=1)


@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_minmax_is_the_definition(bits: int, symmetric: bool, group_size: int) -> None:
    weight = slow.drawn_weight(6, 40)
    scale, zero = weight_scales(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    spans = slow.groups_of(40, group_size)
    want = [
        [slow.minmax_grid(slow.float64(weight)[row, span], bits, symmetric) for span in spans]
        for row in range(6)
    ]
    # One rounding to float32.
    np.testing.assert_allclose(scale.numpy(), np.array(want)[..., 0], rtol=2e-7)
    if zero is not None:
        np.testing.assert_array_equal(zero.numpy(), np.array(want)[..., 1])


def test_narrow_leaves_out_the_smallest_integer() -> None:
    weight = slow.drawn_weight(6, 40)
    scale, _ = weight_scales(weight, bits=8, group_size=0, symmetric=True, narrow=True)
    np.testing.assert_allclose(scale[:, 0], weight.abs().amax(dim=1) / 127, rtol=2e-7)
    tensor = quantize(weight, scale, None, bits=8, group_size=0, narrow=True)
    assert int(tensor.values.min()) >= -127
    assert (tensor.values.abs().amax(dim=1) == 127).all()


@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_is_numpys(symmetric: bool, group_size: int) -> None:
    weight = slow.drawn_weight(5, 72)
    scale, zero = weight_scales(
        weight,
        bits=4,
        group_size=group_size,
        symmetric=symmetric,
        method="percentile",
        percentile=90.0,
    )
    for row in range(5):
        for group, span in enumerate(slow.groups_of(72, group_size)):
            ends = np.percentile(slow.float64(weight)[row, span], [10.0, 90.0])
            width, at = slow.minmax_grid(ends, 4, symmetric)
            # Quantiles are interpolated in float32.
            assert float(scale[row, group]) == pytest.approx(width, rel=1e-5)
            assert zero is None or int(zero[row, group]) == at


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize(
    ("symmetric", "method"), [(True, "mse"), (True, "mse_signed"), (False, "mse")]
)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_search_finds_what_a_loop_finds(
    bits: int, symmetric: bool, method: RangeMethod, group_size: int, counted: bool
) -> None:
    weight = slow.drawn_weight(4, 40, seed=bits)
    counts = torch.rand(40, generator=torch.Generator().manual_seed(1)) ** 2 if counted else None
    got = errors_of(weight, bits, group_size, symmetric, method, counts)
    numbers = np.ones(40) if counts is None else slow.float64(counts)
    for row in range(4):
        for group, span in enumerate(slow.groups_of(40, group_size)):
            want = slow.searched_error(
                slow.float64(weight)[row, span],
                numbers[span],
                bits,
                symmetric,
                method == "mse_signed",
            )
            # Rounding again with the scale that was found can only do better.
            assert got[row, group] <= want * (1 + 1e-4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([0, 8, 20]),
    st.integers(0, 10**6),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e10]),
)
def test_search_is_never_worse_than_minmax(
    bits: int, symmetric: bool, group_size: int, seed: int, size: float
) -> None:
    weight = slow.drawn_weight(3, 30, seed=seed) * size
    weight[0, :9] = 0.0
    widest = errors_of(weight, bits, group_size, symmetric, "minmax")
    searched = errors_of(weight, bits, group_size, symmetric, "mse")
    signed = errors_of(weight, bits, group_size, symmetric, "mse_signed")
    # The sums that a search compares are float32.
    slack = 1e-5 * (slow.float64(weight) ** 2).sum(axis=1, keepdims=True)
    assert (searched <= widest + slack).all()
    assert (signed <= searched + slack).all()


def test_a_negative_scale_reaches_up() -> None:
    weight = torch.tensor([[8.0, -1.0, 2.0, 3.0]])
    scale, _ = weight_scales(weight, bits=4, group_size=0, symmetric=True, method="mse_signed")
    assert scale.item() == -1.0
    tensor = quantize(weight, scale, None, bits=4, group_size=0)
    assert tensor.values.tolist() == [[-8, 1, -2, -3]]


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "mse_signed"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_have_scale_one(symmetric: bool, method: RangeMethod) -> None:
    weight = torch.zeros(2, 20)
    weight[1, 16:] = 1e-44
    scale, zero = weight_scales(weight, bits=4, group_size=8, symmetric=symmetric, method=method)
    assert scale.tolist() == [[1.0] * 3] * 2
    tensor = quantize(weight, scale, zero, bits=4, group_size=8)
    assert tensor.dequantize().abs().max() == 0.0


@settings(deadline=None, derandomize=True)
@given(
    st.floats(-1e30, 1e30, allow_subnormal=True),
    st.floats(-1e30, 1e30, allow_subnormal=True),
    st.sampled_from([4, 8, 16]),
    st.booleans(),
)
def test_zero_is_a_number_of_every_grid(a: float, b: float, bits: int, symmetric: bool) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero = affine_of(low, high, bits=bits, symmetric=symmetric)
    least, most = slow.limits(bits)
    assert float(np.float32(scale)) == scale > 0.0
    assert least <= zero <= most
    assert zero == 0 or not symmetric
    # The grid reaches both ends, up to the half step that its zero is moved by.
    assert (least - zero) * scale <= low + 0.500001 * scale
    assert (most - zero) * scale >= high - 0.500001 * scale


def test_ranges_of_no_width_and_of_one_number() -> None:
    assert affine_of(0.0, 0.0, bits=8, symmetric=False) == (1.0, -128)
    assert affine_of(0.0, 0.0, bits=8, symmetric=True) == (1.0, 0)
    assert affine_of(255.0, 255.0, bits=8, symmetric=False) == (1.0, -128)
    assert affine_of(-255.0, -255.0, bits=8, symmetric=False) == (1.0, 127)
    with pytest.raises(ValueError, match=r"^a range from nan to 1.0$"):
        affine_of(float("nan"), 1.0, bits=8, symmetric=False)


def seen(x: Tensor, parts: int = 1) -> ActivationRange:
    record = ActivationRange("decoder.layers.0.mlp.up")
    for part in x.chunk(parts):
        record.update(part)
    return record


def test_record_is_that_of_numpy_however_it_is_cut() -> None:
    x = slow.drawn_inputs(60, 24)
    x[37] *= 1000.0
    whole, parts = seen(x), seen(x.reshape(20, 3, 24), parts=7)
    assert whole.minmax() == parts.minmax() == (float(x.min()), float(x.max()))
    np.testing.assert_array_equal(parts.channel_absmax, x.abs().amax(dim=0))
    np.testing.assert_allclose(parts.channel_mean, slow.float64(x).mean(axis=0), rtol=1e-4)
    for share in (100.0, 99.9, 95.0, 60.0):
        assert whole.percentile(share) == parts.percentile(share)
    assert whole.mse(bits=4, symmetric=False) == parts.mse(bits=4, symmetric=False)
    assert parts.num_rows == 60


@pytest.mark.parametrize("share", [99.0, 90.0, 50.0])
def test_percentile_leaves_out_what_it_says(share: float) -> None:
    x = slow.drawn_inputs(100, 16)
    low, high = seen(x, parts=3).percentile(share)
    numbers = np.sort(slow.float64(x).ravel())
    allowed = int(len(numbers) * (100 - share) / 100)
    reach = 2.0 ** np.ceil(np.log2(np.abs(numbers).max()))
    width = 2 * reach / NUM_BINS
    # At most so many are left out, and with one bin less it would be more.
    assert (numbers < low).sum() <= allowed < (numbers < low + 1.001 * width).sum()
    assert (numbers > high).sum() <= allowed < (numbers > high - 1.001 * width).sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_finds_about_the_best_ends(bits: int, symmetric: bool) -> None:
    x = slow.drawn_inputs(200, 16).abs() - 0.5
    numbers = slow.float64(x).ravel()
    record = seen(x)

    def error(low: float, high: float) -> float:
        scale, zero = affine_of(low, high, bits=bits, symmetric=symmetric)
        least, most = slow.limits(bits)
        values = np.clip(np.round(numbers / scale) + zero, least, most)
        return float(((numbers - (values - zero) * scale) ** 2).mean())

    low, high = record.mse(bits=bits, symmetric=symmetric)
    widest = record.minmax()
    shares = np.geomspace(1.0, 0.01, 60)
    if symmetric:
        reach = max(-widest[0], widest[1])
        best = min(error(-reach * share, reach * share) for share in shares)
    else:
        best = min(error(widest[0] * a, widest[1] * b) for a in shares for b in shares)
    # Bins stand for the numbers in them, and one end is moved at a time.
    assert error(low, high) <= best * 1.03
    assert error(low, high) <= error(*widest)


def test_sixteen_bits_keep_the_whole_range() -> None:
    x = slow.drawn_inputs(100, 16)
    low, high = seen(x).mse(bits=16, symmetric=False)
    assert low == pytest.approx(float(x.min()), rel=0.06)
    assert high == pytest.approx(float(x.max()), rel=0.06)


def test_a_record_of_zeros() -> None:
    record = seen(torch.zeros(4, 8))
    assert record.minmax() == record.percentile() == (0.0, 0.0)
    assert record.mse(bits=8, symmetric=False) == record.mse(bits=8, symmetric=True) == (0.0, 0.0)
    record.update(torch.full((1, 8), 3.0))
    assert record.percentile(100.0) == (0.0, 3.0)


def test_numbers_that_are_none_are_refused() -> None:
    record = seen(slow.drawn_inputs(4, 8))
    bad = torch.ones(2, 3, 8)
    bad[0, 1, 2], bad[1, 0, 0] = torch.nan, torch.inf
    with pytest.raises(PassError) as error:
        record.update(bad)
    assert str(error.value) == (
        "quantize at decoder.layers.0.mlp.up: 2 of 48 activations are NaN or infinite\n"
        "  hint: check the weights of the checkpoint and the calibration data"
    )
    assert record.num_rows == 4
    with pytest.raises(PassError) as error:
        check_finite(bad, "weights", site="vision.embed", name="smooth")
    assert str(error.value) == (
        "smooth at vision.embed: 2 of 48 weights are NaN or infinite\n"
        "  hint: check the weights of the checkpoint and the calibration data"
    )


def test_a_site_that_nothing_reached_is_named() -> None:
    record = ActivationRange("projector.up")
    record.update(torch.zeros(0, 8))
    with pytest.raises(PassError) as error:
        record.minmax()
    assert str(error.value) == (
        "quantize at projector.up: calibration never reached it\n"
        "  hint: give samples that use this part of the model, or leave it out with `skip`"
    )
