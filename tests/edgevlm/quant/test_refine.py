"""Refined scales and integers: against slow definitions, and never worse than what they were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgevlm.quant.affine import QuantTensor
from edgevlm.quant.gptq import Hessian, gptq, output_errors
from edgevlm.quant.refine import (
    CLIP_RATIOS,
    RIDGE,
    clip_search,
    descend,
    refit_scales,
    scale_estimation,
)
from edgevlm.quant.rtn import rtn
from tests.edgevlm.quant import slow
from tests.edgevlm.quant.slow import Floats

Refine = Callable[[Tensor, QuantTensor, Hessian], QuantTensor]
ALL: list[Refine] = [clip_search, scale_estimation, refit_scales, descend]


def case(symmetric: bool, group_size: int, seed: int = 0) -> tuple[Tensor, QuantTensor, Hessian]:
    weight = slow.drawn_weight(8, 40, seed)
    hessian = slow.hessian_of(slow.drawn_inputs(120, 40, seed))
    tensor = rtn(weight, bits=4, group_size=group_size, symmetric=symmetric)
    return weight, tensor, hessian


def parts(tensor: QuantTensor) -> tuple[Floats, Floats, Floats]:
    """Integers, scales and zeros in float64."""
    zero = torch.zeros_like(tensor.scale) if tensor.zero is None else tensor.zero
    return slow.float64(tensor.values), slow.float64(tensor.scale), slow.float64(zero)


def error(d: Floats, mean: Floats) -> float:
    return float(d @ mean @ d)


@pytest.mark.parametrize("refine", ALL)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(2, 8),
    st.sampled_from([0, 8, 12]),
    st.booleans(),
    st.sampled_from(["rtn", "gptq", "mse_signed"]),
    st.integers(2, 60),
    st.integers(0, 10**6),
)
def test_no_row_gets_worse(
    refine: Refine, bits: int, group_size: int, symmetric: bool, start: str, rows: int, seed: int
) -> None:
    weight, x = slow.drawn_weight(5, 32, seed), slow.drawn_inputs(rows, 32, seed)
    weight[0], x[:, 3] = 0.0, 0.0
    hessian = slow.hessian_of(x)
    grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    if start == "gptq":
        tensor = gptq(weight, hessian, **grid).tensor  # type: ignore[arg-type]
    else:
        ranges = "minmax" if start == "rtn" else "mse_signed"
        tensor = rtn(weight, ranges=ranges, **grid)  # type: ignore[arg-type]
    after = refine(weight, tensor, hessian)
    mean = hessian.mean()
    assert bool((output_errors(weight, after, mean) <= output_errors(weight, tensor, mean)).all())
    assert bool((after.scale * tensor.scale > 0).all())
    least, most = slow.limits(bits)
    assert least <= int(after.values.min()) <= int(after.values.max()) <= most
    assert (after.bits, after.group_size) == (bits, group_size)


@pytest.mark.parametrize("refine", ALL)
@pytest.mark.parametrize("group_size", [0, 16])
def test_gains_something(refine: Refine, group_size: int) -> None:
    weight, tensor, hessian = case(symmetric=True, group_size=group_size)
    mean = hessian.mean()
    before = output_errors(weight, tensor, mean).sum()
    after = output_errors(weight, refine(weight, tensor, hessian), mean).sum()
    # The least that any of them gains here is 12 %: estimated scales of whole rows.
    assert float(after) < 0.9 * float(before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
def test_clips_as_a_loop_does(group_size: int, symmetric: bool) -> None:
    weight, tensor, hessian = case(symmetric, group_size)
    mean, numbers = slow.float64(hessian.mean()), slow.float64(weight)
    values, scale, zero = parts(tensor)
    want = np.zeros_like(numbers)
    for row in range(8):
        for group, span in enumerate(slow.groups_of(40, group_size)):
            least = np.inf
            for ratio in (1.0, *CLIP_RATIOS):
                width, at = scale[row, group] * ratio, zero[row, group]
                tried = [(slow.round_to(w / width, at, 4) - at) * width for w in numbers[row, span]]
                found = error(numbers[row, span] - tried, mean[span, span])
                if found < least:
                    least, want[row, span] = found, tried
        before = (values[row] - np.repeat(zero[row], group_size or 40)[:40]) * np.repeat(
            scale[row], group_size or 40
        )[:40]
        if error(numbers[row] - want[row], mean) >= error(numbers[row] - before, mean):
            want[row] = before
    # Scales are float32.
    np.testing.assert_allclose(
        clip_search(weight, tensor, hessian).dequantize(), want, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
def test_estimates_as_a_loop_does(group_size: int, symmetric: bool) -> None:
    weight, tensor, hessian = case(symmetric, group_size)
    mean, numbers = slow.float64(hessian.mean()), slow.float64(weight)
    values, scale, zero = parts(tensor)
    counts = mean.diagonal()
    spans = slow.groups_of(40, group_size)
    want = np.zeros_like(numbers)
    for row in range(8):
        least = np.inf
        for _ in range(6):
            meant = np.zeros(40)
            for group, span in enumerate(spans):
                q = values[row, span] - zero[row, group]
                meant[span] = q * scale[row, group]
                square = float((counts[span] * q * q).sum())
                fitted = float((counts[span] * q * numbers[row, span]).sum()) / square
                scale[row, group] = fitted if fitted > 0 else scale[row, group]
                for column in range(span.start, span.stop):
                    steps = numbers[row, column] / scale[row, group]
                    values[row, column] = slow.round_to(steps, zero[row, group], 4)
            found = error(numbers[row] - meant, mean)
            if found < least:
                least, want[row] = found, meant
    got = scale_estimation(weight, tensor, hessian)
    # Scales are float32.
    np.testing.assert_allclose(got.dequantize(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
def test_refits_as_least_squares_over_the_inputs_do(group_size: int, symmetric: bool) -> None:
    weight, tensor, hessian = case(symmetric, group_size)
    x = slow.float64(slow.drawn_inputs(120, 40))
    values, scale, zero = parts(tensor)
    numbers = slow.float64(weight)
    spans = slow.groups_of(40, group_size)
    got = refit_scales(weight, tensor, hessian)
    assert torch.equal(got.values, tensor.values)
    for row in range(8):
        outputs = [x[:, span] @ (values[row, span] - zero[row, g]) for g, span in enumerate(spans)]
        inputs = np.stack(outputs, axis=1) / 120**0.5
        target = x @ numbers[row] / 120**0.5
        # The ridge: rows that ask for the scales as they are.
        weights = (RIDGE * (inputs**2).sum(axis=0).mean()) ** 0.5 * np.eye(len(spans))
        want = np.linalg.lstsq(
            np.concatenate([inputs, weights]), np.concatenate([target, weights @ scale[row]])
        )[0]
        # Moments in float32, and the condition of a few groups' outputs.
        np.testing.assert_allclose(slow.float64(got.scale)[row], want, rtol=1e-3)


def test_refits_many_rows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, tensor, hessian = case(symmetric=False, group_size=16)
    whole = refit_scales(weight, tensor, hessian)
    monkeypatch.setattr("edgevlm.quant.refine.CHUNK", 100)
    # Products of other sizes are summed in another order.
    torch.testing.assert_close(
        refit_scales(weight, tensor, hessian).scale, whole.scale, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
def test_descends_as_a_loop_does(group_size: int, symmetric: bool) -> None:
    weight, tensor, hessian = case(symmetric, group_size)
    mean, numbers = slow.float64(hessian.mean()), slow.float64(weight)
    values, scale, zero = parts(tensor)
    for row in range(8):
        at = [column // group_size if group_size else 0 for column in range(40)]
        meant = np.array(
            [(values[row, c] - zero[row, at[c]]) * scale[row, at[c]] for c in range(40)]
        )
        for _ in range(2):
            for column in range(40):
                others = numbers[row] - meant
                others[column] = 0.0
                best = numbers[row, column] + mean[column] @ others / mean[column, column]
                width, shift = scale[row, at[column]], zero[row, at[column]]
                values[row, column] = slow.round_to(best / width, shift, 4)
                meant[column] = (values[row, column] - shift) * width
    got = descend(weight, tensor, hessian, rounds=2, block=16)
    np.testing.assert_array_equal(slow.float64(got.values), values)
