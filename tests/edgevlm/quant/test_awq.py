"""AWQ against a search of all its candidates on all rows, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgevlm.quant.awq import awq, awq_scale
from edgevlm.quant.gptq import Hessian
from edgevlm.quant.ranges import RangeMethod
from tests.edgevlm.quant import slow
from tests.edgevlm.quant.slow import Floats


def inputs_with_outliers(rows: int, columns: int, seed: int = 0) -> Tensor:
    x = slow.drawn_inputs(rows, columns, seed)
    x[:, 5::11] *= 12.0
    return x


def candidates(weights: list[Floats], x: Floats, group_size: int) -> list[Floats]:
    """Powers of the inputs' mean size, alone and over those of the weights'."""
    inputs = np.abs(x).mean(axis=0)
    stacked = np.concatenate(weights)
    sizes = np.zeros_like(inputs)
    for span in slow.groups_of(len(inputs), group_size):
        part = np.abs(stacked[:, span])
        sizes[span] = (part / part.max(axis=1, keepdims=True)).mean(axis=0)
    scales = [np.ones_like(inputs)]
    for step in range(1, 21):
        scales.append(inputs ** (step / 20))
        scales.append(inputs ** (step / 20) / sizes ** (1 - step / 20))
    return [scale / np.sqrt(scale.max() * scale.min()) for scale in scales]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
def test_finds_the_best_of_all_candidates(group_size: int, symmetric: bool) -> None:
    weights = [slow.drawn_weight(12, 44), slow.drawn_weight(8, 44, seed=7)]
    x = inputs_with_outliers(200, 44)
    result = awq(
        weights,
        slow.hessian_of(x),
        bits=4,
        group_size=group_size,
        symmetric=symmetric,
        clip=False,
    )
    numbers, inputs = [slow.float64(weight) for weight in weights], slow.float64(x)
    tried = []
    for scale in candidates(numbers, inputs, group_size):
        error = 0.0
        for weight in numbers:
            _, meant = slow.rtn(weight * scale, 4, group_size, symmetric)
            error += slow.output_error(weight, meant / scale, inputs)
        tried.append((error, scale))
    error, scale = min(tried, key=lambda pair: pair[0])
    assert result.kept == "awq"
    # Sums and scales in float32.
    assert result.objective == pytest.approx(error, rel=1e-3)
    assert result.rtn_objective == pytest.approx(tried[0][0], rel=1e-3)
    np.testing.assert_allclose(result.scale, scale, rtol=1e-4)
    assert result.objective < 0.8 * result.rtn_objective


def test_objective_is_the_error_of_the_outputs() -> None:
    weight, x = slow.drawn_weight(16, 44), inputs_with_outliers(200, 44)
    result = awq([weight], slow.hessian_of(x), bits=4, group_size=16, symmetric=True, ranges="mse")
    meant = slow.float64(result.tensors[0].dequantize() / result.scale)
    error = slow.output_error(slow.float64(weight), meant, slow.float64(x))
    # Sums in float32.
    assert result.objective == pytest.approx(error, rel=1e-4)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.integers(3, 8),
    st.sampled_from([0, 8, 12]),
    st.booleans(),
    st.sampled_from(["minmax", "percentile", "mse", "mse_signed"]),
    st.booleans(),
    st.integers(2, 60),
    st.integers(0, 10**6),
)
def test_is_never_worse_than_rounding_to_nearest(
    bits: int,
    group_size: int,
    symmetric: bool,
    ranges: RangeMethod,
    clip: bool,
    rows: int,
    seed: int,
) -> None:
    weights = [slow.drawn_weight(5, 32, seed), slow.drawn_weight(3, 32, seed + 1)]
    x = inputs_with_outliers(rows, 32, seed)
    result = awq(
        weights,
        slow.hessian_of(x),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        ranges=ranges,
        clip=clip,
    )
    assert result.objective <= result.rtn_objective
    assert bool((result.scale > 0).all())
    assert len(result.tensors) == 2


def test_channels_that_are_never_on_do_no_harm() -> None:
    weight, x = slow.drawn_weight(8, 40), inputs_with_outliers(100, 40)
    x[:, :7] = 0.0
    weight[:, 30] = 0.0
    result = awq([weight], slow.hessian_of(x), bits=4, group_size=8, symmetric=True)
    assert bool(torch.isfinite(result.scale).all())
    assert result.objective < result.rtn_objective


def test_keeps_rounding_to_nearest_where_nothing_is_better() -> None:
    """Weights that are on the grid already."""
    weight = torch.randint(-7, 8, (6, 32), generator=torch.Generator().manual_seed(0)).float()
    weight[:, 0] = 7.0
    hessian = Hessian(32)
    hessian.update(inputs_with_outliers(100, 32))
    result = awq([weight], hessian, bits=4, group_size=0, symmetric=True)
    assert result.kept == "rtn"
    assert bool((result.scale == 1).all())
    assert torch.equal(result.tensors[0].dequantize(), weight)
    assert result.objective == result.rtn_objective == 0.0


def test_columns_that_can_only_be_scaled_alike_are() -> None:
    """Every two neighbours have the larger size of both; without that, it is the scale of `awq`."""
    weight, hessian = slow.drawn_weight(16, 44), slow.hessian_of(inputs_with_outliers(200, 44))
    grid = {"bits": 4, "group_size": 16, "symmetric": True}

    def of_pairs(size_K: Tensor) -> Tensor:
        return size_K.unflatten(0, (-1, 2)).amax(dim=1).repeat_interleave(2)

    paired = awq_scale([weight], hessian, pooled=of_pairs, **grid)  # type: ignore[arg-type]
    pairs = paired.scale.unflatten(0, (-1, 2))
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    free = awq_scale([weight], hessian, **grid)  # type: ignore[arg-type]
    rounded = awq([weight], hessian, clip=False, **grid)  # type: ignore[arg-type]
    assert torch.equal(free.scale, rounded.scale)
    # Sums in another order.
    assert free.objective == pytest.approx(rounded.objective, rel=1e-4)
    assert free.rtn_objective == pytest.approx(rounded.rtn_objective, rel=1e-4)
    assert free.objective < paired.objective < paired.rtn_objective
