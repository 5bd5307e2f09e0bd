"""GPTQ against the paper's own form in float64, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.errors import PassError
from edgevlm.quant.gptq import Hessian, gptq, output_errors, unit_factor
from edgevlm.quant.ranges import RangeMethod
from edgevlm.quant.rtn import rtn
from tests.edgevlm.quant import slow
from tests.edgevlm.quant.slow import Floats


def paper(
    weight: Floats,
    mean: Floats,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool,
    damp: float = 0.01,
) -> Floats:
    """The weights that GPTQ means: the inverse's Cholesky factor, one row and column at a time."""
    rows, columns = weight.shape
    order = np.argsort(-mean.diagonal(), kind="stable") if act_order else np.arange(columns)
    damped = mean[np.ix_(order, order)] + damp * mean.diagonal().mean() * np.eye(columns)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    spans = slow.groups_of(columns, group_size)
    meant = np.zeros_like(weight)
    for row in range(rows):
        left = weight[row].copy()
        grids = [slow.minmax_grid(weight[row, span], bits, symmetric) for span in spans]
        for place, column in enumerate(order):
            group = column // group_size if group_size else 0
            if group_size and not act_order and column == spans[group].start:
                grids[group] = slow.minmax_grid(left[spans[group]], bits, symmetric)
            scale, zero = grids[group]
            value = slow.round_to(left[column] / scale, zero, bits)
            meant[row, column] = (value - zero) * scale
            share = (left[column] - meant[row, column]) / factor[place, place]
            left[order[place:]] -= share * factor[place, place:]
    return meant


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 16, 32])
def test_rounds_as_the_paper_does(group_size: int, symmetric: bool, act_order: bool) -> None:
    weight, x = slow.drawn_weight(10, 72), slow.drawn_inputs(300, 72)
    hessian = slow.hessian_of(x)
    # Blocks of 24 end inside groups, and are brought to their ends.
    result = gptq(
        weight,
        hessian,
        bits=4,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        block=24,
    )
    numbers, mean = slow.float64(weight), slow.float64(hessian.mean())
    want = paper(numbers, mean, 4, group_size, symmetric, act_order)
    _, nearest = slow.rtn(numbers, 4, group_size, symmetric)
    errors = [
        ((numbers - meant) @ mean * (numbers - meant)).sum(axis=1) for meant in (want, nearest)
    ]
    is_worse = errors[1] < errors[0]
    want[is_worse] = nearest[is_worse]
    assert result.rtn_rows == is_worse.sum() <= 1
    # The same integers, with scales that are rounded to float32.
    np.testing.assert_allclose(result.tensor.dequantize(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", [1, 24, 128])
def test_blocks_change_nothing(block: int) -> None:
    weight, hessian = slow.drawn_weight(10, 72), slow.hessian_of(slow.drawn_inputs(300, 72))
    results = [
        gptq(weight, hessian, bits=4, group_size=16, symmetric=True, ranges="mse", block=size)
        for size in (block, 72)
    ]
    assert torch.equal(results[0].tensor.values, results[1].tensor.values)


@pytest.mark.parametrize("symmetric", [True, False])
def test_many_rows_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch, symmetric: bool) -> None:
    weight, hessian = slow.drawn_weight(10, 72), slow.hessian_of(slow.drawn_inputs(300, 72))
    whole = gptq(weight, hessian, bits=4, group_size=32, symmetric=symmetric)
    monkeypatch.setattr("edgevlm.quant.gptq.MAX_ROWS", 4)
    parts = gptq(weight, hessian, bits=4, group_size=32, symmetric=symmetric)
    assert torch.equal(parts.tensor.values, whole.tensor.values)
    # Products of other sizes are summed in another order.
    torch.testing.assert_close(parts.tensor.scale, whole.tensor.scale, rtol=1e-5, atol=0)
    assert (parts.tensor.zero is None) == symmetric
    assert parts.objective == pytest.approx(whole.objective, rel=1e-5)
    assert parts.rtn_objective == pytest.approx(whole.rtn_objective, rel=1e-5)
    assert parts.rtn_rows == whole.rtn_rows


def test_objective_is_the_error_of_the_outputs() -> None:
    weight, x = slow.drawn_weight(10, 72), slow.drawn_inputs(300, 72)
    result = gptq(weight, slow.hessian_of(x), bits=4, group_size=32, symmetric=True)
    plain = rtn(weight, bits=4, group_size=32, symmetric=True)
    numbers, inputs = slow.float64(weight), slow.float64(x)
    # Sums of float32.
    for tensor, got in ((result.tensor, result.objective), (plain, result.rtn_objective)):
        want = slow.output_error(numbers, slow.float64(tensor.dequantize()), inputs)
        assert got == pytest.approx(want, rel=1e-4)
    assert result.kept == "gptq"


def test_error_is_the_sum_over_the_factors_diagonal() -> None:
    """What a search weighs columns with: d H d^T = sum of R_jj^2 e_j^2, e_j as rounding moves."""
    mean = slow.hessian_of(slow.drawn_inputs(200, 40)).mean()
    factor, square = unit_factor(mean, 0.01)
    d = slow.float64(slow.drawn_weight(1, 40, seed=5))[0]
    damped = slow.float64(mean) + 0.01 * slow.float64(mean).diagonal().mean() * np.eye(40)
    upper = slow.float64(factor)
    assert np.allclose(upper, np.triu(upper))
    e = d @ upper
    # The factor is rounded to float32.
    assert float((slow.float64(square) * e * e).sum()) == pytest.approx(d @ damped @ d, rel=1e-5)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(2, 8),
    st.sampled_from([0, 8, 12]),
    st.booleans(),
    st.sampled_from(["minmax", "percentile", "mse", "mse_signed"]),
    st.booleans(),
    st.integers(3, 60),
    st.integers(0, 10**6),
)
def test_is_never_worse_than_rounding_to_nearest(
    bits: int,
    group_size: int,
    symmetric: bool,
    ranges: RangeMethod,
    act_order: bool,
    rows: int,
    seed: int,
) -> None:
    """Row by row, also with fewer rows of inputs than columns."""
    weight, hessian = (
        slow.drawn_weight(6, 32, seed),
        slow.hessian_of(slow.drawn_inputs(rows, 32, seed)),
    )
    result = gptq(
        weight,
        hessian,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        ranges=ranges,
        act_order=act_order,
    )
    plain = rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric, ranges=ranges)
    got = output_errors(weight, result.tensor, hessian.mean())
    nearest = output_errors(weight, plain, hessian.mean())
    assert bool((got <= nearest).all())
    assert result.objective <= result.rtn_objective


def test_keeps_rounding_to_nearest_where_nothing_is_better() -> None:
    """Inputs that do not move together leave nothing to make up for."""
    weight, hessian = slow.drawn_weight(6, 32), Hessian(32)
    hessian.update(torch.eye(32))
    result = gptq(weight, hessian, bits=4, group_size=0, symmetric=True)
    plain = rtn(weight, bits=4, group_size=0, symmetric=True)
    assert torch.equal(result.tensor.values, plain.values)
    assert (result.kept, result.rtn_rows) == ("rtn", 6)
    assert result.objective == result.rtn_objective


def test_columns_without_input_are_rounded_to_nearest() -> None:
    weight, x = slow.drawn_weight(8, 48), slow.drawn_inputs(200, 48)
    x[:, [3, 17, 40]] = 0.0
    result = gptq(weight, slow.hessian_of(x), bits=4, group_size=0, symmetric=True)
    plain = rtn(weight, bits=4, group_size=0, symmetric=True)
    assert torch.equal(result.tensor.values[:, [3, 17, 40]], plain.values[:, [3, 17, 40]])
    assert result.objective < 0.7 * result.rtn_objective
    nothing = gptq(weight, slow.hessian_of(0 * x), bits=4, group_size=16, symmetric=False)
    assert nothing.kept == "rtn"
    assert nothing.objective == 0.0


def test_a_singular_matrix_is_damped_until_it_is_not() -> None:
    weight, x = slow.drawn_weight(8, 48), slow.drawn_inputs(2, 48) * 1e3
    result = gptq(weight, slow.hessian_of(x), bits=4, group_size=0, symmetric=True, damp=1e-12)
    assert bool(torch.isfinite(result.tensor.scale).all())
    assert result.objective < 0.1 * result.rtn_objective
    with pytest.raises(ValueError, match=r"^no damping up to 0 makes the matrix regular$"):
        unit_factor(-torch.eye(3), 0.0)


@pytest.mark.parametrize("group_size", [0, 24])
def test_gains_what_it_should(group_size: int) -> None:
    """At 4 bits on inputs that move together: the size of the gain, by a wide margin."""
    weight, hessian = slow.drawn_weight(32, 96), slow.hessian_of(slow.drawn_inputs(500, 96))
    arguments = {"bits": 4, "group_size": group_size, "symmetric": True}
    plain = gptq(weight, hessian, **arguments)  # type: ignore[arg-type]
    ordered = gptq(weight, hessian, act_order=True, **arguments)  # type: ignore[arg-type]
    searched = gptq(weight, hessian, ranges="mse", act_order=True, **arguments)  # type: ignore[arg-type]
    assert plain.objective < 0.7 * plain.rtn_objective
    assert ordered.objective < plain.objective
    assert searched.objective < 0.7 * ordered.objective


def test_moments_are_those_of_numpy() -> None:
    x = slow.drawn_inputs(60, 24)
    hessian = Hessian(24, site="decoder.head")
    for part in x.reshape(12, 5, 24).split(5):
        hessian.update(part)
    numbers = slow.float64(x)
    # Sums of 60 products in float32.
    np.testing.assert_allclose(hessian.mean(), numbers.T @ numbers / 60, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(hessian.channel_mean, numbers.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(hessian.channel_absmean, np.abs(numbers).mean(axis=0), rtol=1e-5)
    assert hessian.count == 60
    often = Hessian(24)
    often.update(x[:40])
    often.update(x[40:], 3)
    repeated = slow.hessian_of(torch.cat([x, x[40:], x[40:]]))
    assert often.count == repeated.count == 100
    np.testing.assert_allclose(often.mean(), repeated.mean(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(often.channel_mean, repeated.channel_mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(often.channel_absmean, repeated.channel_absmean, rtol=1e-5)
    scale = torch.rand(24) + 0.5
    divided = hessian.divided(scale)
    other = slow.hessian_of(x / scale)
    np.testing.assert_allclose(divided.mean(), other.mean(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(divided.channel_absmean, other.channel_absmean, rtol=1e-5)
    np.testing.assert_allclose(divided.channel_mean, other.channel_mean, rtol=1e-3, atol=1e-6)


def test_numbers_that_are_none_are_refused() -> None:
    hessian = Hessian(8, site="decoder.layers.3.mlp.down", name="quantize")
    with pytest.raises(PassError) as error:
        hessian.mean()
    assert str(error.value) == (
        "quantize at decoder.layers.3.mlp.down: calibration never reached it\n"
        "  hint: give samples that use this part of the model, or leave it out with `skip`"
    )
    bad = torch.ones(3, 8)
    bad[1, 5] = torch.inf
    with pytest.raises(PassError) as error:
        hessian.update(bad)
    assert str(error.value) == (
        "quantize at decoder.layers.3.mlp.down: 1 of 24 activations are NaN or infinite\n"
        "  hint: check the weights of the checkpoint and the calibration data"
    )
    assert hessian.count == 0
