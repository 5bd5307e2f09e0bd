"""The first diverging site, found in few runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from edgevlm.evidence.bisect import (
    NOISE,
    computed_order,
    first_divergence,
    site_errors,
    site_outputs,
)

SITES = [f"decoder.layers.{i}.mlp.down" for i in range(300)]


def _step_at(fault: int, error: float, noise: float = 1e-6) -> tuple[list[int], object]:
    calls: list[int] = []

    def measure(sites: Sequence[str]) -> Mapping[str, float]:
        calls.append(len(sites))
        return {
            site: error * 1.01 ** (SITES.index(site) - fault)
            if SITES.index(site) >= fault
            else noise
            for site in sites
        }

    return calls, measure


@pytest.mark.parametrize("fault", [0, 1, 17, 150, 298, 299])
@pytest.mark.parametrize("error", [1e-3, 0.5, np.nan])
def test_finds_the_site_of_a_fault_in_few_runs(fault: int, error: float) -> None:
    calls, measure = _step_at(fault, error)
    found = first_divergence(SITES, measure)  # type: ignore[arg-type]
    assert found is not None
    assert found.site == SITES[fault]
    assert found.before == (SITES[fault - 1] if fault else None)
    # 300 sites shrink by a factor of 16 a run.
    assert found.runs == len(calls) <= 5


def test_agreement_is_no_divergence() -> None:
    _, measure = _step_at(300, 1.0, noise=NOISE / 2)
    assert first_divergence(SITES, measure) is None  # type: ignore[arg-type]


def test_site_outputs_are_those_of_the_named_modules() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    seen = site_outputs(model, ["0", "1"], lambda: model(x))
    # The same modules on the same input: equal to the bit.
    np.testing.assert_array_equal(seen["1"], model(x).detach().numpy().ravel())
    np.testing.assert_array_equal(seen["0"], model[0](x).detach().numpy().ravel())


def test_site_outputs_of_several_calls_follow_each_other() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    tiles = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    seen = site_outputs(model, ["1"], lambda: [model(tile) for tile in tiles])
    # Products of one row do not depend on how many there are, up to the order of additions.
    np.testing.assert_allclose(seen["1"], model(tiles).detach().numpy().ravel(), atol=1e-6)


def test_order_is_that_of_the_first_call() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())
    x = torch.zeros(1, 3)
    assert computed_order(model, ["1", "0"], lambda: [model(x), model(x)]) == ["0", "1"]


def test_site_errors_are_in_units_of_std() -> None:
    want = np.array([0.0, 2.0, 4.0], np.float32)
    errors = site_errors({"a": want}, {"a": np.array([[0.0, 2.0, 4.5]], np.float32)})
    assert errors["a"] == pytest.approx(0.5 / want.std(), rel=1e-6)
