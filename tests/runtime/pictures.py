"""A toy bundle that reduces visual rows between its layers, and its recurrence in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm_runtime.decode.decoder import StepDecoder
from edgevlm_runtime.decode.protocol import Prompt
from edgevlm_runtime.manifest import GraphSpec
from tests.runtime.bundles import (
    IMAGE_TOKENS,
    embedding_graph,
    variant_of,
    vision_graph,
    write_manifest,
)
from tests.runtime.decoders import TABLE, TOKENS
from tests.runtime.onnx_graph import OnnxGraph
from tests.runtime.reduction import Reduction, dropped_rows
from tests.runtime.toy import (
    WIDTH,
    Array,
    Layer,
    Reference,
    delta_graph,
    inplace_graph,
    toy_groups,
    toy_weights,
)

EARLY = (
    Layer(kind="attention", name="0", group="early"),
    Layer(kind="mlp", name="1", group="early"),
)
LAYERS = (
    *EARLY,
    Layer(kind="attention", name="2", group="late"),
    Layer(kind="mlp", name="3", group="late"),
)
COLUMNS = (*EARLY, Layer(kind="conv", name="c", group="late"), *LAYERS[2:])
CAPACITIES = {"early": 90, "late": 60}
DROPPED = 3
FORMS = ("ort", "static")
ALL = ("prefill", "decode", "verify")


def reduction_of(pictures: int | str) -> Reduction:
    return Reduction(group="late", tokens=IMAGE_TOKENS, dropped=DROPPED, pictures=pictures)


def write_bundle(
    folder: Path,
    form: str,
    *,
    packed: Sequence[str] = (),
    layers: Sequence[Layer] = LAYERS,
    **fields: Any,
) -> Path:
    """Form `ort` takes up to 40 rows with any number of pictures, `static` two numbers of them."""
    folder.mkdir(exist_ok=True)
    steps = _dynamic if form == "ort" else _static
    graphs = (
        embedding_graph(folder, TABLE),
        vision_graph(folder),
        *steps(folder, layers, packed),
    )
    cache = "kv_inplace" if form == "ort" else "kv_delta"
    variant = variant_of(form, graphs, toy_groups(layers, CAPACITIES, cache))
    return write_manifest(folder, {form: variant}, **fields)


def _dynamic(folder: Path, layers: Sequence[Layer], packed: Sequence[str]) -> list[GraphSpec]:
    weights = toy_weights(layers, 3)
    step = inplace_graph(
        OnnxGraph(folder, "step", "step"),
        layers,
        weights,
        CAPACITIES,
        packed=packed,
        phases=ALL,
        max_rows=12,
    )
    picture = inplace_graph(
        OnnxGraph(folder, "picture", "step"),
        layers,
        weights,
        CAPACITIES,
        reduction=reduction_of("P"),
        packed=packed,
        phases=("picture",),
        max_rows=40,
    )
    return [step, picture]


def _static(folder: Path, layers: Sequence[Layer], packed: Sequence[str]) -> list[GraphSpec]:
    weights = toy_weights(layers, 3)
    steps = [
        delta_graph(
            OnnxGraph(folder, f"step_{rows}", "step"),
            layers,
            weights,
            CAPACITIES,
            rows=rows,
            num_logits=rows,
            packed=packed,
            phases=ALL,
        )
        for rows in (1, 4)
    ]
    pictures = [
        delta_graph(
            OnnxGraph(folder, f"picture_{count}_{rows}", "step"),
            layers,
            weights,
            CAPACITIES,
            rows=rows,
            num_logits=1,
            reduction=reduction_of(count),
            packed=packed,
            phases=("picture",),
        )
        for count, rows in ((1, 16), (1, 24), (2, 30))
    ]
    return [*steps, *pictures]


def picture_prompt(pictures: int, begins_at: int = 0, words: int = 4, seed: int = 1) -> Prompt:
    """Three words, and for each picture its rows and two words, then a question of some words."""
    random = np.random.default_rng(seed)
    pieces = [TABLE[TOKENS[:3]]]
    begins = []
    for number in range(pictures):
        begins.append(sum(map(len, pieces)))
        pieces.append(random.standard_normal((IMAGE_TOKENS, WIDTH)).astype(np.float32))
        pieces.append(TABLE[TOKENS[3 + number : 5 + number]])
    pieces.append(TABLE[TOKENS[10 : 10 + words]])
    embeds = np.concatenate(pieces)
    question = np.zeros(len(embeds), np.float32)
    question[begins[-1] + IMAGE_TOKENS :] = 1
    return Prompt(
        embeds=embeds,
        positions=np.arange(begins_at, begins_at + len(embeds)),
        next_position=begins_at + len(embeds),
        picture_rows=np.array(begins, np.int64),
        row_weights={"question": question},
    )


@dataclass(kw_only=True, slots=True)
class Recurrence:
    """The same decoder in float64; positions count on by one from 0."""

    layers: Sequence[Layer] = LAYERS
    packed: Sequence[str] = ()
    length: int = 0
    whole: Reference = field(init=False)
    early: Reference = field(init=False)

    def __post_init__(self) -> None:
        self.whole = Reference(layers=self.layers, packed=self.packed)
        self.early = Reference(layers=EARLY)

    def prefill(self, prompt: Prompt) -> Array:
        """Logits of the last row."""
        gone: list[int] = []
        places = self._places(len(prompt.embeds))
        weights = toy_weights(self.layers, 3)
        _, hidden = self.early.call(weights, prompt.embeds, places)
        if len(prompt.picture_rows):
            asked = prompt.row_weights["question"]
            gone = dropped_rows(hidden, prompt.picture_rows, asked, reduction_of("P"))
        logits, _ = self.whole.call(weights, prompt.embeds, places, gone={"late": gone})
        return logits[-1:]

    def extend(self, tokens: Sequence[int]) -> Array:
        """Logits of every token."""
        places = self._places(len(tokens))
        weights = toy_weights(self.layers, 3)
        self.early.call(weights, TABLE[list(tokens)], places)
        return self.whole.call(weights, TABLE[list(tokens)], places)[0]

    def _places(self, num_rows: int) -> Array:
        self.length += num_rows
        return np.arange(self.length - num_rows, self.length)


def check_caches(decoder: StepDecoder, recurrence: Recurrence, atol: float) -> None:
    """The used slots of both caches hold the keys and values of the recurrence."""
    layers = {"early": "0", "late": "2"}
    for group in decoder._groups:
        cache = np.array(recurrence.whole.memory[layers[group.name]])
        block = next(block for block in group.blocks if block.tensors[0].kind.startswith("kv"))
        assert group.used == len(cache)
        keys, values = block.reads()[:, 0, 0, : group.used]
        np.testing.assert_allclose(np.hstack([keys, values]), cache, atol=atol, rtol=0)
