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

from edgevlm.model.stages import Seen
from edgevlm.reduce.seq import VisSeq

PROBES = 16
"""Sites compared in one run of both sides: few enough to hold, enough to need three runs."""

NOISE = 2e-4
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


def first_divergence(
    sites: Sequence[str], measure: Callable[[Sequence[str]], Mapping[str, float]]
) -> Divergence | None:
    """Return the first site that diverges, or None where even the last one agrees.

    `measure(sites)` returns, per site, the largest error in units of that site's std.
    """
    last = measure(sites[-1:])[sites[-1]]
    if last <= NOISE:
        return None
    # A NaN at the end leaves the noise alone, which every error before it is held against.
    allowed = NOISE if np.isnan(last) else max(NOISE, SHARE * last)
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
    """Run the model; return what each module put out, flattened, all its calls one after another.

    A module is called once for every tile of a picture, and the reference's once for all of them.
    """
    seen: dict[str, list[NDArray[np.float32]]] = {}

    def note(site: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Seen):
            first = first.tokens
        if isinstance(first, VisSeq):
            first = first.features
        seen.setdefault(site, []).append(first.detach().float().flatten().numpy().copy())

    _hooked(model, sites, note, run)
    return {site: np.concatenate(outputs) for site, outputs in seen.items()}


def computed_order(model: nn.Module, sites: Sequence[str], run: Callable[[], object]) -> list[str]:
    """The sites in the order in which the model first computes them."""
    order: dict[str, None] = {}
    _hooked(model, sites, lambda site, _output: order.setdefault(site), run)
    return list(order)


def _hooked(
    model: nn.Module,
    sites: Sequence[str],
    note: Callable[[str, Any], None],
    run: Callable[[], object],
) -> None:
    """Run the model with `note(site, output)` called behind the modules of these names."""

    def hook(site: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: note(site, output)

    handles = [model.get_submodule(site).register_forward_hook(hook(site)) for site in sites]
    try:
        with torch.inference_mode():
            run()
    finally:
        for handle in handles:
            handle.remove()


def site_errors(
    reference: Mapping[str, NDArray[np.float32]], other: Mapping[str, NDArray[np.float32]]
) -> dict[str, float]:
    """Return the largest error of each site in units of its std; values are compared in order."""
    errors = {}
    for site, want in reference.items():
        error = np.abs(want.ravel().astype(np.float64) - other[site].ravel()).max()
        errors[site] = float(error / max(float(want.std()), 1e-12))
    return errors
