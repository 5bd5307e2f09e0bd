"""A bottleneck by definition, in float64: with a mask written row by row, and with no mask at all.

The second way reads a prompt piece by piece, each up to the rows that stand for a picture, and
throws the keys and values of the visual tokens away before the next piece.
"""

from __future__ import annotations

import numpy as np

from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from tests.edgevlm.reduce.deep import Asked, deep_spec, model_of, staged
from tests.edgevlm.reduce.reference import Reference

# T rows, N visual tokens of a picture, m rows behind them

ROWS = 4
"""Rows that stand for a picture."""


def hiding_spec(num_layers: int = 3, *, keep: int = ROWS) -> VlmSpec:
    """Pictures of 36 tokens and some rows behind them."""
    stage = {"at": "projector", "keep": keep, "bottleneck": "learned_rows"}
    return staged(deep_spec(num_layers), stage)


def hiding_model(num_layers: int = 3, seed: int = 0) -> Vlm:
    """Its model, drawn from a seed."""
    return model_of(hiding_spec(num_layers), seed)


def unseen(spec: VlmSpec, asked: Asked) -> np.ndarray:
    """[T, T] whether row i, which stands behind row j, does not see it."""
    length = asked.rows.shape[1]
    found = np.zeros((length, length), bool)
    for start in asked.starts:
        for row in range(length):
            for other in range(length):
                is_visual = start <= other < start + spec.hidden
                found[row, other] |= is_visual and row >= start + spec.entering
    return found


def masked(model: Vlm, asked: Asked) -> np.ndarray:
    """Logits [T, V] of all rows, with the mask."""
    reference = Reference(model)
    x = asked.rows[0].double().numpy()
    hidden = unseen(model.spec, asked)
    for index in range(len(model.spec.decoder.layers)):
        x = reference.layer(index, x, asked.positions.numpy().astype(float), hidden)
    return reference.head(x)


def deleted(model: Vlm, asked: Asked) -> tuple[np.ndarray, int]:
    """Logits [T, V] of all rows, piece by piece, and how many keys of a layer are left."""
    reference, spec = Reference(model), model.spec
    ends = [int(start) + spec.entering for start in asked.starts]
    caches: list[list[np.ndarray]] = [[] for _ in spec.decoder.layers]
    logits, begin = [], 0
    for end in [*ends, asked.rows.shape[1]]:
        x = asked.rows[0, begin:end].double().numpy()
        positions = asked.positions[begin:end].numpy().astype(float)
        start = end - spec.entering
        gone = range(start, start + spec.hidden) if end in ends else range(0)
        stays = [row for row in range(begin, end) if row not in gone]
        for index, cache in enumerate(caches):
            x = _extended(reference, index, x, positions, cache, [row - begin for row in stays])
        logits.append(reference.head(x))
        begin = end
    return np.concatenate(logits), len(caches[0])


def _extended(
    reference: Reference,
    index: int,
    x: np.ndarray,
    positions: np.ndarray,
    cache: list[np.ndarray],
    stays: list[int],
) -> np.ndarray:
    """Rows of a piece behind a layer; the keys and values of those that stay go to the cache."""
    spec = reference.spec.layers[index].attention
    q, k, v = reference.projected(index, x)
    q, k = reference.turned(q, positions), reference.turned(k, positions)
    out = np.zeros((len(x), spec.num_heads, spec.head_dim))
    for row in range(len(x)):
        keys = np.array([*(pair[0] for pair in cache), *k[: row + 1]])
        values = np.array([*(pair[1] for pair in cache), *v[: row + 1]])
        for head in range(spec.num_heads):
            group = head // (spec.num_heads // spec.num_kv_heads)
            shares = np.exp(keys[:, group] @ q[row, head] * spec.scale)
            out[row, head] = shares @ values[:, group] / shares.sum()
    cache += [np.stack([k[row], v[row]]) for row in stays]
    name = f"layers.{index}"
    x = x + out.reshape(len(x), -1) @ reference.weights[f"{name}.attention.out.weight"].T
    normed = reference.norm(f"{name}.norm2", x)
    gate, up = (
        normed @ reference.weights[f"{name}.mlp.{part}.weight"].T for part in ("gate", "up")
    )
    found: np.ndarray = x + (gate / (1 + np.exp(-gate)) * up) @ (
        reference.weights[f"{name}.mlp.down.weight"].T
    )
    return found
