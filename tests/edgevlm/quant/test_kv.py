"""Scales of a quantized cache, against keys and values worked out in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.errors import PassError
from edgevlm.evidence.fed import pixels_of, positions
from edgevlm.model.attention import AttentionCore
from edgevlm.model.vlm import Vlm
from edgevlm.quant import kv as kv_module
from edgevlm.quant.calibrate import CalibrationCase
from edgevlm_export.ops.kv_grid import LIMITS
from tests.edgevlm.calibrated import quantized, samples_of
from tests.edgevlm.tiny import drawn, tiny_spec

LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448, "float8_e5m2": 57344}
TARGET = {"int8": "ort", "int4": "ort", "float8_e4m3fn": "static", "float8_e5m2": "static"}
HEADS, WIDTH = 2, 16


@torch.no_grad()
def caches_of(model: Vlm, cases: list[CalibrationCase]) -> list[list[np.ndarray]]:
    """Keys and values [rows, heads, width] of every layer, float64, rotated here."""
    packed: list[list[Tensor]] = [[] for _ in model.decoder.layers]
    handles = [
        layer.get_submodule("attention.qkv").register_forward_hook(
            lambda _module, _inputs, output, seen=seen: seen.append(output[0])
        )
        for layer, seen in zip(model.decoder.layers, packed, strict=True)
    ]
    angles = []
    for case in cases:
        visual = torch.cat(
            [model.encode(pixels_of(feed)).flatten(0, 1) for feed in case.question.feeds]
        )
        fed = torch.tensor(case.answer[:-1])
        rows = model.embed(torch.from_numpy(case.question.prompt.token_ids), visual)
        places = positions(case.question, len(fed))
        model.whole(model.decoder, torch.cat([rows, model.embedding(fed)[None]], 1), places)
        frequencies = np.array(model.spec.decoder.rope.inv_freq)
        angles.append(places.numpy()[:, None] * frequencies)
    for handle in handles:
        handle.remove()
    cos, sin = np.cos(np.concatenate(angles)), np.sin(np.concatenate(angles))
    found = []
    for seen in packed:
        qkv = torch.cat(seen).double().numpy()
        k, v = (x.reshape(-1, HEADS, WIDTH) for x in np.split(qkv[:, 64:], 2, axis=1))
        first, second = k[..., : WIDTH // 2], k[..., WIDTH // 2 :]
        c, s = cos[:, None], sin[:, None]
        found.append([np.concatenate([first * c - second * s, second * c + first * s], -1), v])
    return found


def core_of(model: Vlm, index: int) -> AttentionCore:
    core = model.decoder.layers[index].get_submodule("attention.core")
    assert isinstance(core, AttentionCore)
    return core


def by_hand(x: np.ndarray, dtype: str, granularity: str) -> np.ndarray:
    """Scales of rows [M, heads, width]; those of int4 by trying every share of the largest."""
    columns = x.reshape(-1, 1) if granularity == "tensor" else x.reshape(len(x), -1)
    widest = np.abs(columns).max(axis=0) / LARGEST[dtype]
    if dtype != "int4":
        return widest
    ratios = np.linspace(1.0, 0.5, 21)
    best = np.empty_like(widest)
    for column in range(columns.shape[1]):
        errors = []
        for ratio in ratios:
            step = widest[column] * ratio
            rounded = np.clip(np.round(columns[:, column] / step), -8, 7) * step
            errors.append(((columns[:, column] - rounded) ** 2).sum())
        best[column] = widest[column] * ratios[int(np.argmin(errors))]
    return best


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", LARGEST)
def test_scales_are_those_of_the_float_decoder(dtype: str, granularity: str) -> None:
    cases = samples_of(tiny_spec())
    plain, model = drawn(tiny_spec()), drawn(tiny_spec())
    kv = {"dtype": dtype, "granularity": granularity}
    change = quantized(model, {"kv": kv}, cases, targets=(TARGET[dtype],))
    assert change.sites == ("decoder.layers.0.attention.core", "decoder.layers.1.attention.core")
    for index, (keys, values) in enumerate(caches_of(plain, cases)):
        core = core_of(model, index)
        for scale, x in ((core.k_scale, keys), (core.v_scale, values)):
            assert scale is not None
            shape = (1,) if granularity == "tensor" else (HEADS, 1, WIDTH)
            assert scale.shape == shape
            assert not scale.requires_grad
            want = by_hand(x, dtype, granularity)
            # Keys of size 3 in float32, rotated there in another order.
            np.testing.assert_allclose(scale.flatten().numpy(), want, rtol=3e-6)
            if dtype != "int4":
                most = np.abs(x / scale.numpy().reshape(-1, *shape[::2])).max()
                assert most <= LIMITS[dtype][1] * (1 + 3e-6)


def test_a_clip_of_int4_is_no_worse_than_none() -> None:
    cases = samples_of(tiny_spec())
    model, plain = drawn(tiny_spec()), drawn(tiny_spec())
    quantized(model, {"kv": "int4"}, cases)
    ratios = []
    for index, found in enumerate(caches_of(plain, cases)):
        core = core_of(model, index)
        for scale, x in zip((core.k_scale, core.v_scale), found, strict=True):
            assert scale is not None
            step = scale.double().numpy().reshape(1, HEADS, WIDTH)
            widest = np.abs(x).max(axis=0, keepdims=True) / 7
            errors = [
                ((x - np.clip(np.round(x / s), -8, 7) * s) ** 2).sum(axis=0).ravel()
                for s in (step, widest)
            ]
            assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
            ratios += list(errors[0] / errors[1])
    assert np.mean(ratios) < 0.97


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_largest_number_counts_wherever_it_is(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clip is searched on few rows; the range it starts from is of all of them."""
    monkeypatch.setattr(kv_module, "ROWS", 8)
    cases = samples_of(tiny_spec())
    model = drawn(tiny_spec())
    quantized(model, {"kv": {"dtype": dtype, "granularity": "tensor"}}, cases)
    _, values = caches_of(drawn(tiny_spec()), cases)[0]
    largest = np.abs(values).max()
    # Else the test would not tell: of each sample's 25 rows, those taken do not have it.
    step = sum(len(case.question.prompt.token_ids) for case in cases) // 8
    assert np.abs(values).max(axis=(1, 2)).argmax() % 25 % step != 0
    scale = core_of(model, 0).v_scale
    assert scale is not None
    steps = float(largest / scale)
    if dtype == "int8":
        assert steps == pytest.approx(127, rel=3e-6)
    else:
        # A multiple of 1/40 of the largest, at most all of it and at least half.
        share = 7 / steps
        assert share * 40 == pytest.approx(round(share * 40), abs=1e-4)
        assert 0.5 <= share <= 1.0 + 1e-5


def test_both_decoders_have_the_same_scales() -> None:
    """Those of the float decoder, whatever is quantized after; and they are one tensor."""
    alone, both = drawn(tiny_spec()), drawn(tiny_spec())
    quantized(alone, {"kv": "int8"})
    quantized(both, {"kv": "int8", "prefill": "w8a8", "decoder": "w4a16"})
    for index in range(2):
        for name in ("k_scale", "v_scale"):
            site = f"layers.{index}.attention.core"
            scale = both.decoder.get_submodule(site).get_parameter(name)
            assert torch.equal(scale, core_of(alone, index).get_parameter(name))
            assert both.prefill is not None
            assert both.prefill.get_submodule(site).get_parameter(name) is scale


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_values_that_are_no_numbers(value: float, dtype: str) -> None:
    """One token's row is so, the last of the last sample's, which is in none of the few rows."""
    cases = samples_of(tiny_spec(), 1)
    model = drawn(tiny_spec(tied=False))
    with torch.no_grad():
        model.embedding.weight[cases[0].answer[0]] = value
    with pytest.raises(PassError) as caught:
        quantized(model, {"kv": dtype}, cases)
    assert str(caught.value) == (
        "quantize at decoder.layers.0.attention.core: its keys or values hold NaN or infinity on "
        "the calibration samples\n  hint: check the checkpoint, and the passes before this one"
    )


@pytest.mark.parametrize(("dtype", "granularity"), [("int8", "channel"), ("int4", "channel")])
def test_a_feature_that_is_never_used(dtype: str, granularity: str) -> None:
    """Its scale divides, so it is one; all others are as they were."""
    plain, model = drawn(tiny_spec()), drawn(tiny_spec())
    kv: dict[str, Any] = {"dtype": dtype, "granularity": granularity}
    quantized(plain, {"kv": kv})
    with torch.no_grad():
        model.decoder.layers[0].attention.qkv.weight[64 + 32 + 5] = 0.0
    quantized(model, {"kv": kv})
    ours, theirs = core_of(model, 0).v_scale, core_of(plain, 0).v_scale
    assert ours is not None
    assert theirs is not None
    assert float(ours.flatten()[5]) == 1.0
    assert torch.equal(ours.flatten()[6:], theirs.flatten()[6:])
