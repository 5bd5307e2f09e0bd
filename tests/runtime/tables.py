"""Quantized embedding tables for tests, packed number by number."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from edgevlm_runtime.files import entry_of
from edgevlm_runtime.manifest import EngineSpec, GraphSpec
from edgevlm_runtime.structure import to_json
from tests.runtime.bundles import embedding_graph, write_toy
from tests.runtime.toy import VOCAB, WIDTH, Array


def packed(bits: int, block: int, width: int, vocabulary: int = 50) -> tuple[Array, Array, Array]:
    """Codes, scales and, number by number, what they stand for; the rest of a block is not zero."""
    random = np.random.default_rng(bits * block + width)
    blocks = -(-width // block)
    numbers = random.integers(0, 1 << bits, (vocabulary, blocks, block))
    scales = random.uniform(0.01, 0.1, (vocabulary, blocks)).astype(np.float32)
    codes = np.zeros((vocabulary, blocks, block * bits // 8), np.uint8)
    for place in np.ndindex(*numbers.shape):
        token, at, column = place
        if bits == 8:
            codes[place] = numbers[place]
        else:
            codes[token, at, column // 2] += numbers[place] << (4 * (column % 2))
    values = (numbers - (1 << (bits - 1))) * scales.astype(np.float64)[:, :, None]
    return codes, scales, values.reshape(vocabulary, -1)[:, :width]


def quantized_bundle(folder: Path, bits: int) -> tuple[Path, Array]:
    """The toy bundle with its table in blocks of 16, and what the table stands for."""
    write_toy(folder, max_new_tokens=5, eos=())
    codes, scales, values = packed(bits, 16, WIDTH, VOCAB)
    plain = embedding_graph(folder, codes)  # writes the codes in place of the table
    np.save(folder / "scales.npy", scales * 10, allow_pickle=False)
    graph = dataclasses.replace(
        plain,
        engine=EngineSpec(kind="table", options={"bits": str(bits), "block_size": "16"}),
        outputs=(dataclasses.replace(plain.outputs[0], shape=("T", WIDTH)),),
        weights=("scales.npy",),
    )
    relisted(folder, graph)
    return folder, values * 10


def relisted(folder: Path, graph: GraphSpec) -> None:
    """Put the graph in the place of the table, and list its files as they are."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for variant in manifest["variants"].values():
        variant["graphs"][0] = to_json(graph)
    for name in (graph.file, *graph.weights):
        manifest["files"][name] = to_json(entry_of(folder / name))
    path.write_text(json.dumps(manifest))
