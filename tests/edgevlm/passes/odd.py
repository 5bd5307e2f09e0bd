"""Models that differ in all that a folded scale or rotation must know of, and runs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.quant.calibrate import (
    CalibrationCase,
    decoder_inputs,
    encode_features,
    project_features,
)
from edgevlm.quant.harm import logits_along
from tests.edgevlm.model import tiny as odd_tiny
from tests.edgevlm.quant.slow import Floats, float64
from tests.edgevlm.tiny import LAYER_NORM, native_spec, tiny_spec


def plain_spec() -> VlmSpec:
    """A decoder of layer norms, in which every head has values of its own and no MLP a gate."""
    spec = tiny_spec(tied=False)
    layers = tuple(
        replace(
            layer,
            attention=replace(layer.attention, num_kv_heads=4, qkv_bias=True, out_bias=True),
            mlp=replace(layer.mlp, gated=False, activation="gelu", bias=True),
            norm1=LAYER_NORM,
            norm2=LAYER_NORM,
        )
        for layer in spec.decoder.layers
    )
    return replace(spec, decoder=replace(spec.decoder, layers=layers, norm=LAYER_NORM))


def short(spec: VlmSpec) -> VlmSpec:
    """One layer of the encoder, and one of the decoder."""
    return replace(
        spec,
        vision=replace(spec.vision, layers=spec.vision.layers[:1], feature_layers=(1,)),
        decoder=replace(spec.decoder, layers=spec.decoder.layers[:1]),
    )


RMS_SPECS = {
    "tied": tiny_spec(),
    "untied": short(tiny_spec(tied=False)),
    "head norms": short(tiny_spec(head_norms=True)),
    "native": short(native_spec((4, 6))),
    "biases": short(
        odd_tiny.vlm_spec(odd_tiny.decoder(odd_tiny.attention(window=5)), odd_tiny.vision())
    ),
}
"""Decoders whose norms are root mean squares: query heads share values, MLPs have gates."""

SPECS = RMS_SPECS | {"plain": short(plain_spec())}


def logits_of(model: Vlm, cases: Sequence[CalibrationCase]) -> Tensor:
    """The logits of all answers, one row after the other."""
    return torch.from_numpy(np.concatenate(logits_along(model, cases)))


def inputs_of(
    model: Vlm, cases: Sequence[CalibrationCase], sites: Sequence[str]
) -> dict[str, Floats]:
    """What linear maps are given by whole prompts and their answers, one row after the other."""
    found: dict[str, list[Floats]] = {site: [] for site in sites}
    handles = [
        model.get_submodule(site).register_forward_pre_hook(
            lambda _module, inputs, site=site: found[site].append(float64(inputs[0].flatten(0, -2)))
        )
        for site in sites
    ]
    with torch.no_grad():
        visual = project_features(model, cases, encode_features(model, cases))
        for fed in decoder_inputs(model, cases, visual, answers=True):
            model(fed.rows, fed.positions)
    for handle in handles:
        handle.remove()
    return {site: np.concatenate(rows) for site, rows in found.items()}


def nearest(weight: Floats, group_size: int) -> Floats:
    """Weights [N, K] rounded to int4 without zeros, each group by its own range."""
    size = group_size or weight.shape[1]
    rounded = np.zeros_like(weight)
    for start in range(0, weight.shape[1], size):
        part = weight[:, start : start + size]
        scale = np.maximum(part.max(axis=1) / 7, part.min(axis=1) / -8)[:, None]
        rounded[:, start : start + size] = np.clip(np.round(part / scale), -8, 7) * scale
    return rounded
