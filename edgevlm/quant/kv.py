"""Scales of a quantized cache, from what the float decoder would put there on the samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from edgevlm.errors import PassError
from edgevlm.evidence.fed import Visual
from edgevlm.model.attention import Attention, AttentionCore
from edgevlm.model.decoder import Decoder
from edgevlm.model.spec import KvQuant
from edgevlm.model.vlm import Vlm
from edgevlm.quant.calibrate import CalibrationCase, decoder_inputs

__all__ = ["calibrate_cache"]

LARGEST = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
"""The number that the largest of a cache becomes."""

ROWS = 4096
"""Rows of a layer that a clip is searched on, evenly taken."""

LEAST = 1e-12
"""A feature that stays below this is nothing."""

RATIOS = torch.linspace(1.0, 0.5, 21)
"""Shares of the largest number at which int4 is tried to end: 15 numbers bear some clipping."""


class _Seen:
    """Keys or values of a layer [.., F]: the largest of every feature, and rows to search on."""

    def __init__(self, step: int) -> None:
        """Keep every `step`-th row of a call, or none."""
        self.step = step
        self.rows: list[Tensor] = []
        self.largest = torch.zeros(())

    def note(self, x: Tensor) -> None:
        """Look at the rows [T, F] of a call."""
        self.largest = torch.maximum(self.largest, x.abs().amax(dim=0))
        if self.step:
            self.rows.append(x[:: self.step].clone())


def calibrate_cache(
    model: Vlm, kv: KvQuant, cases: Sequence[CalibrationCase], visual: Sequence[Visual | None]
) -> None:
    """Give every layer's cache its constant scales; keys are seen after rotary.

    The decoder for prompts shares them: both write the same cache.
    """
    num_rows = sum(len(case.question.prompt.token_ids) for case in cases)
    step = max(1, num_rows // ROWS) if kv.dtype == "int4" else 0
    seen = _see_caches(model, cases, visual, step)
    for index, layer in enumerate(model.decoder.layers):
        attention = layer.get_submodule("attention")
        assert isinstance(attention, Attention)
        spec = model.spec.decoder.layers[index].attention
        core = AttentionCore(spec)
        for name, found in zip(("k_scale", "v_scale"), seen[index], strict=True):
            site = f"decoder.layers.{index}.attention.core"
            scale = _scale(found, kv, site).reshape(core.get_parameter(name).shape)
            setattr(core, name, torch.nn.Parameter(scale, requires_grad=False))
        attention.core = core
        if model.prefill is not None:
            twin = model.prefill.layers[index].get_submodule("attention")
            twin.core = core


def _see_caches(
    model: Vlm, cases: Sequence[CalibrationCase], visual: Sequence[Visual | None], step: int
) -> list[tuple[_Seen, _Seen]]:
    """What the keys and the values of every layer are like."""
    seen = [(_Seen(step), _Seen(step)) for _ in model.decoder.layers]

    def note(index: int, keys: Tensor, values: Tensor) -> None:
        for found, x in zip(seen[index], (keys, values), strict=True):
            found.note(x[0])

    observers = [partial(note, index) for index in range(len(seen))]
    for fed in decoder_inputs(model, cases, visual, answers=True):
        hidden = model.hidden(fed.rows, fed.pictures)
        keys = model.whole_keys(fed.positions, observers, hidden)
        decoder: Decoder = model.decoder
        decoder(fed.rows, keys, torch.tensor([0]), fed.pictures)
    return seen


def _scale(seen: _Seen, kv: KvQuant, site: str) -> Tensor:
    """The scale of all numbers [1], or of each feature [F]."""
    if not bool(torch.isfinite(seen.largest).all()):
        raise PassError(
            "its keys or values hold NaN or infinity on the calibration samples",
            name="quantize",
            site=site,
            hint="check the checkpoint, and the passes before this one",
        )
    is_whole = kv.granularity == "tensor"
    largest = seen.largest.amax().view(1) if is_whole else seen.largest
    # The kernel multiplies by the reciprocal: of a feature that is never used it must be finite.
    widest = torch.where(largest > LEAST, largest / LARGEST[kv.dtype], 1.0)
    if kv.dtype != "int4":
        return widest
    rows = torch.cat(seen.rows)
    columns = rows.flatten()[:, None] if is_whole else rows
    best, error = widest, torch.full_like(widest, torch.inf)
    for ratio in RATIOS:
        step = widest * ratio
        most = LARGEST[kv.dtype]
        rounded = torch.round(columns / step).clamp(-most - 1, most) * step
        found = (columns - rounded).square().sum(dim=0)
        best = torch.where(found < error, step, best)
        error = torch.minimum(found, error)
    return best
