"""Inputs that a graph can be run with to see what it does: seeded, and of usual sizes.

A step is run in the middle of a conversation: some slots of its cache are used. The numbers do not
matter to the kernels that are chosen, the sizes do to the time that they take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgevlm_runtime.manifest import GraphSpec, TensorSpec, carrier

__all__ = ["example_feeds", "written_in_place"]

PROMPT_ROWS = 256
USED_SLOTS = 64
TEXT_ROWS = 64
QUESTION_ROWS = 8


def example_feeds(graph: GraphSpec, capacity: int, tokens: int = 0) -> dict[str, np.ndarray]:
    """An array for every input; `capacity` are the slots of the state that a step has.

    A step for prompts alone gets a prompt of 256 rows, or as many as fit; one that takes visual
    tokens away a prompt of one picture, of so many `tokens`, and some text; any other a token.
    """
    random = np.random.default_rng(0)
    pictures = next((x.shape[0] for x in graph.inputs if x.source == "picture_rows"), 0)
    pictures = 1 if isinstance(pictures, str) else pictures
    wanted = PROMPT_ROWS if graph.phases == ("prefill",) else 1
    if pictures:
        wanted = pictures * tokens + TEXT_ROWS
    rows = graph.rows or wanted
    if not pictures:
        rows = min(rows, graph.max_rows or rows, max(1, capacity // 2))
    used = 0 if pictures else min(USED_SLOTS, capacity - rows)
    call = _Call(graph=graph, rows=rows, used=used, pictures=pictures, tokens=tokens)
    return {tensor.name: _array(tensor, call, random) for tensor in graph.inputs}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """What an example is about: a call of so many rows, with so many pictures of some tokens."""

    graph: GraphSpec
    rows: int
    used: int
    pictures: int
    tokens: int

    def rows_of(self, group: str) -> int:
        """Rows that reach a state group."""
        return self.rows - self.pictures * self.graph.dropped.get(group, 0)


def written_in_place(graph: GraphSpec, outputs: Mapping[str, str]) -> dict[str, str]:
    """Outputs that are written over inputs, of those that renew a state: output, then input."""
    names = {tensor.source.partition(":")[2]: tensor.name for tensor in graph.inputs}
    return {output: names[state] for output, state in outputs.items() if state in names}


def _array(tensor: TensorSpec, call: _Call, random: np.random.Generator) -> np.ndarray:
    sizes = {"T": call.rows, "R": 1, "N": 1, "P": call.pictures, "Q": QUESTION_ROWS}
    shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
    kind, _, name = tensor.source.partition(":")
    dtype = carrier(tensor.dtype)
    if kind in ("last_slot", "total", "used"):
        end = call.used + call.rows_of(name)
        return np.full(shape, {"last_slot": end - 1, "total": end, "used": call.used}[kind], dtype)
    if kind in ("logit_rows", "last_row"):
        return np.full(shape, call.rows - 1, dtype)
    if kind == "picture_rows":
        return np.arange(call.pictures, dtype=dtype) * call.tokens
    if kind == "row_weights":
        return (np.arange(call.rows) >= call.pictures * call.tokens).astype(dtype)[None]
    if kind == "question_weights":
        return np.ones(shape, dtype)
    if kind == "state":
        return np.zeros(shape, dtype)
    if kind == "rope_cos":
        return np.ones(shape, dtype)
    if kind == "rope_sin":
        return np.zeros(shape, dtype)
    if kind == "mask":
        rows, closed = shape[-2], call.graph.mask_value
        mask = np.full(shape, closed, dtype)
        mask[..., : call.used] = 0
        mask[..., shape[-1] - rows :] = np.triu(np.full((rows, rows), closed, dtype), 1)
        return mask
    if kind == "grid":
        return np.asarray([[1, *(call.graph.grid or (1, 1))]], dtype)
    return random.standard_normal(shape).astype(dtype)
