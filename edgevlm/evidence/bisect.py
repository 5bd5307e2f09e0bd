"""The first site at which a written graph departs from the model it was made from.

The last output of a broken graph says only that something is wrong. Sites are compared in the order
in which the graph computes them: a few evenly spaced ones at a time, then a few between the last
that agrees and the first that does not, until one is left. The model's side comes from forward
hooks on the modules of those names, the graph's side from a copy of the file whose values of those
names are outputs too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

PROBES = 16
"""Sites compared in one run of both sides: few enough to hold, enough to need three runs."""

NOISE = 3e-5
"""Float32 kernels that add in another order stay below this, in units of the site's std."""

SHARE = 0.05
"""A site diverges when its error is above this share of the error at the last site."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Where two sides part: the first site that differs, and the last that does not."""

    site: str
    error: float
    before: str | None
    runs: int


Measure = Callable[[Sequence[str]], Mapping[str, float]]


def first_divergence(sites: Sequence[str], measure: Measure) -> Divergence | None:
    """Return the first site that diverges, or None where even the last one agrees.

    `measure(sites)` returns, per site, the largest error in units of that site's std.
    """
    last = measure(sites[-1:])[sites[-1]]
    allowed = max(NOISE, SHARE * last)
    if not last > NOISE and not np.isnan(last):
        return None
    low, high, error, runs = -1, len(sites) - 1, last, 1
    while high - low > 1:
        step = max(1, (high - low) // PROBES)
        probes = list(range(low + step, high, step))
        errors = measure([sites[i] for i in probes])
        runs += 1
        for i in probes:
            # NaN compares false with everything, and a NaN is a divergence.
            if not errors[sites[i]] <= allowed:
                high, error = i, errors[sites[i]]
                break
            low = i
    return Divergence(
        site=sites[high], error=error, before=sites[low] if low >= 0 else None, runs=runs
    )


def site_outputs(
    model: nn.Module, sites: Sequence[str], run: Callable[[], object]
) -> dict[str, NDArray[np.float32]]:
    """Run the model and return what the modules of those names put out."""
    seen: dict[str, NDArray[np.float32]] = {}

    def hook(site: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen[site] = first.detach().float().numpy().copy()

        return note

    handles = [model.get_submodule(site).register_forward_hook(hook(site)) for site in sites]
    try:
        with torch.inference_mode():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def site_errors(
    reference: Mapping[str, NDArray[np.float32]], graph: Mapping[str, NDArray[np.float32]]
) -> dict[str, float]:
    """Return the largest error of each site in units of its std; rows are compared flattened."""
    return {
        site: float(
            np.abs(want.ravel().astype(np.float64) - graph[site].ravel()).max()
            / max(float(want.std()), 1e-12)
        )
        for site, want in reference.items()
    }
