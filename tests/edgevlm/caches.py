"""Models with a quantized cache for tests, their scales found by watching one sequence."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from edgevlm.model.attention import AttentionCore
from edgevlm.model.spec import KvQuant, VlmSpec
from edgevlm.model.vlm import Vlm
from tests.edgevlm.tiny import drawn

LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448, "float8_e5m2": 57344}
# Several times what another order of sums changes in a key of size 3.
NEAR = 2e-6
POSITIONS = torch.arange(40) + 2 * (torch.arange(40) > 4)


def with_cache(spec: VlmSpec, kv: KvQuant | None) -> VlmSpec:
    """The same model with another cache."""
    layers = tuple(
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, kv=kv))
        for layer in spec.decoder.layers
    )
    return dataclasses.replace(spec, decoder=dataclasses.replace(spec.decoder, layers=layers))


def cores_of(model: Vlm) -> list[AttentionCore]:
    return [part for part in model.decoder.modules() if isinstance(part, AttentionCore)]


def rows_of(model: Vlm, length: int = 40) -> Tensor:
    """Embedded rows [1, T, W] of some tokens."""
    rows: Tensor = model.embedding(torch.arange(length)[None] * 7 % 90)
    return rows.detach()


@torch.no_grad()
def cached(spec: VlmSpec, dtype: str, granularity: str = "channel") -> Vlm:
    """A drawn model whose scales reach to the largest numbers that it has in float32.

    Its seed is the first with which no number of a cache lies next to a tie: there another order of
    sums would round to the other side, and one such number moves logits by up to 0.5 (int4).
    """
    return next(
        model
        for seed in itertools.count()
        if not _has_ties(
            model := _scaled(spec, KvQuant(dtype=dtype, granularity=granularity), seed)
        )
    )


def _scaled(spec: VlmSpec, kv: KvQuant, seed: int) -> Vlm:
    plain = drawn(spec, seed)
    model = Vlm(with_cache(spec, kv)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    for core, rows in zip(cores_of(model), seen(plain), strict=True):
        for scale, x in zip(scales_of(core), rows, strict=True):
            largest = x.abs().amax(dim=(0, 1)).view(core.spec.num_kv_heads, 1, -1)
            largest = largest.amax().view(1) if scale.numel() == 1 else largest
            scale.copy_(largest / LARGEST[kv.dtype])
    return model


def _has_ties(model: Vlm) -> bool:
    return any(
        not torch.equal(core.rounded(x + NEAR, scale), core.rounded(x - NEAR, scale))
        for core, rows in zip(cores_of(model), seen(model), strict=True)
        for scale, x in zip(scales_of(core), rows, strict=True)
    )


def seen(model: Vlm) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer for the rows of `rows_of`, before they are rounded."""
    found: list[tuple[Tensor, Tensor]] = []
    observers = [lambda k, v: found.append((k, v)) for _ in cores_of(model)]
    keys = model.whole_keys(POSITIONS, observers)
    model.decoder(rows_of(model), keys)
    return found


def scales_of(core: AttentionCore) -> tuple[Tensor, Tensor]:
    """Scales of keys and of values."""
    assert core.k_scale is not None
    assert core.v_scale is not None
    return core.k_scale.data, core.v_scale.data
