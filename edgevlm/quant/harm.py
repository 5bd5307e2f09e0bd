"""Harm: how far each quantized site alone moves the answers, and what float sites would save.

Both sides run along the same answers, so that their logits belong to the same rows: KL(float ||
quantized) in nats, averaged over rows. A site's noise by itself, on the inputs of the float model,
is told as well, because that needs one run for all sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgevlm.evidence.fed import Visual, inputs_along
from edgevlm.evidence.measures import logits_agreement, sqnr_db
from edgevlm.model.vlm import Vlm
from edgevlm.progress import Progress
from edgevlm.quant.calibrate import CalibrationCase, encode_features, project_features

__all__ = [
    "SiteHarm",
    "SiteNoise",
    "extra_bytes",
    "logits_along",
    "site_harms",
    "site_noises",
    "split_alike",
    "swapped",
]

Logits = list[NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteNoise:
    """What quantization adds to the output of one site.

    `own_db` is the noise of the site alone, on inputs of the float model; `sqnr_db` and `rms` (in
    units of the output's root mean square) are of the whole quantized model up to there.
    """

    site: str
    scheme: str
    own_db: float
    sqnr_db: float
    rms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteHarm:
    """KL of the logits where this site alone is quantized, and the bytes that float would take."""

    site: str
    kl: float
    extra_bytes: int


@torch.no_grad()
def logits_along(
    model: Vlm,
    cases: Sequence[CalibrationCase],
    visual: Sequence[Visual | None] | None = None,
) -> Logits:
    """Logits [len(answer), V] of each case's rows that choose its answer.

    `visual` are the rows of each case's pictures, where they are known.
    """
    if visual is None:
        visual = project_features(model, cases, encode_features(model, cases))
    found = []
    for case, rows in zip(cases, visual, strict=True):
        fed = inputs_along(model, case.question, rows, case.answer)
        found.append(model.answer(*fed).numpy())
    return found


@contextmanager
def swapped(model: Vlm, other: Vlm, sites: Sequence[str]) -> Iterator[Vlm]:
    """The model with these sites' modules taken from another."""
    before = {site: model.get_submodule(site) for site in sites}
    try:
        for site in sites:
            model.set_submodule(site, other.get_submodule(site))
            _share_head(model)
        yield model
    finally:
        for site, module in before.items():
            model.set_submodule(site, module)
        _share_head(model)


def site_harms(
    float_model: Vlm,
    quantized: Vlm,
    cases: Sequence[CalibrationCase],
    progress: Progress,
) -> list[SiteHarm]:
    """The harm of every quantized site alone, the worst first."""
    split_alike(float_model, quantized)
    visual = project_features(float_model, cases, encode_features(float_model, cases))
    reference = logits_along(float_model, cases, visual)
    harms = []
    schemes = quantized.spec.schemes
    with progress.stage("harm of each site", len(schemes)) as advance:
        for site in schemes:
            sees_pixels = site.startswith(("vision.", "projector."))
            with swapped(float_model, quantized, [site]):
                found = logits_along(float_model, cases, None if sees_pixels else visual)
            kl = logits_agreement(reference, found).kl
            harms.append(SiteHarm(site=site, kl=kl, extra_bytes=extra_bytes(quantized, [site])))
            advance(1)
    return sorted(harms, key=lambda harm: -harm.kl)


@torch.no_grad()
def site_noises(
    float_model: Vlm, quantized: Vlm, cases: Sequence[CalibrationCase]
) -> list[SiteNoise]:
    """The noise that every quantized site has at its output, in the order of computation."""
    split_alike(float_model, quantized)
    schemes = quantized.spec.schemes
    # Squares of the signal, of a site's own noise, and of all noise there.
    sums: dict[str, NDArray[np.float64]] = {}
    # Outputs of the float model wait for the other's: thousands of rows of every site, once.
    waiting: dict[str, list[Tensor]] = {}

    def own_hook(site: str) -> Any:
        module = quantized.get_submodule(site)

        def note(_module: nn.Module, inputs: tuple[Tensor, ...], want: Tensor) -> None:
            found = sums.setdefault(site, np.zeros(3))
            found[0] += float(want.square().sum())
            found[1] += float((want - module(inputs[0])).square().sum())
            waiting.setdefault(site, []).append(want)

        return note

    def whole_hook(site: str) -> Any:
        def note(_module: nn.Module, _inputs: tuple[Tensor, ...], got: Tensor) -> None:
            want = waiting[site].pop(0)
            sums[site][2] += float((want - got).square().sum())

        return note

    for case in cases:
        for model, hook in ((float_model, own_hook), (quantized, whole_hook)):
            handles = [
                model.get_submodule(site).register_forward_hook(hook(site)) for site in schemes
            ]
            try:
                logits_along(model, [case])
            finally:
                for handle in handles:
                    handle.remove()
    return [_noise(site, str(schemes[site]), sums[site]) for site in schemes if site in sums]


def _noise(site: str, scheme: str, sums: NDArray[np.float64]) -> SiteNoise:
    signal, alone, all_noise = sums.tolist()
    return SiteNoise(
        site=site,
        scheme=scheme,
        own_db=_db(signal, alone),
        sqnr_db=_db(signal, all_noise),
        rms=float(np.sqrt(all_noise / signal)) if signal else 0.0,
    )


def _db(signal: float, noise: float) -> float:
    return sqnr_db(np.array([np.sqrt(signal)]), np.array([np.sqrt(signal) - np.sqrt(noise)]))


def extra_bytes(quantized: Vlm, sites: Sequence[str]) -> int:
    """Bytes that float32 weights take beyond those of the schemes."""
    total = 0
    for site in sites:
        weight = quantized.get_submodule(site).get_parameter("weight")
        scheme = quantized.spec.schemes[site]
        total += 4 * weight.numel() - scheme.weights.nbytes(*weight.shape)
    return total


def split_alike(float_model: Vlm, quantized: Vlm) -> None:
    """Give the float model a decoder for prompts too, where the other has one."""
    if quantized.prefill is not None and float_model.prefill is None:
        float_model.split_phases()


def _share_head(model: Vlm) -> None:
    if model.prefill is not None:
        model.prefill.head = model.decoder.head
