"""Decoders over the toy bundle, and the logits that a plain float64 recurrence gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode.decoder import StepDecoder, open_decoder
from edgevlm_runtime.decode.protocol import Prompt
from edgevlm_runtime.engine import Engines
from edgevlm_runtime.engines.table import EmbeddingTable
from tests.runtime.toy import PLAIN, Array, Reference, toy_table, toy_weights

# Logits of up to 8 after three layers in float32: 3e-6 is seen, several times that allowed.
TOLERANCE = 2e-5
TABLE = toy_table()
WEIGHTS = toy_weights(PLAIN, 3)
TOKENS = [int(token) for token in np.random.default_rng(5).integers(0, 300, 40)]
FORMS = ("ort", "static")


def opened(bundle: Path, variant: str | None = None, role: str = "step") -> StepDecoder:
    loaded = Bundle.open(bundle, variant)
    return open_decoder(loaded, Engines(loaded), EmbeddingTable(TABLE), role)


def prompt_of(tokens: list[int], positions: Array | None = None, after: float = -1) -> Prompt:
    places = np.arange(len(tokens)) if positions is None else positions
    return Prompt(
        embeds=TABLE[tokens],
        positions=places,
        next_position=len(tokens) if positions is None else after,
    )


def expected(tokens: list[int], positions: Array | None = None) -> Array:
    """Logits of every row."""
    places = np.arange(len(tokens)) if positions is None else positions
    return Reference(layers=PLAIN).call(WEIGHTS, TABLE[tokens], places)[0]


def close(got: Array, wanted: Array) -> None:
    assert got.dtype == np.float32
    assert np.abs(got - wanted).max() < TOLERANCE
