"""Inputs that a graph can be run with to see what it does: seeded, and of usual sizes.

A step is run in the middle of a conversation: some slots of its cache are used. The numbers do not
matter to the kernels that are chosen, the sizes do to the time that they take.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgevlm_runtime.manifest import GraphSpec, TensorSpec, carrier

__all__ = ["example_feeds", "written_in_place"]

PROMPT_ROWS = 256
USED_SLOTS = 64


def example_feeds(graph: GraphSpec, capacity: int) -> dict[str, np.ndarray]:
    """An array for every input; `capacity` are the slots of the state that a step has.

    A step for prompts alone gets a prompt of 256 rows, or as many as fit, any other a token.
    """
    random = np.random.default_rng(0)
    rows = graph.rows or (PROMPT_ROWS if graph.phases == ("prefill",) else 1)
    rows = min(rows, graph.max_rows or rows, max(1, capacity // 2))
    used = min(USED_SLOTS, capacity - rows)
    sizes = {"T": rows, "R": 1, "N": 1}
    return {
        tensor.name: _array(tensor, sizes, rows, used, graph, random) for tensor in graph.inputs
    }


def written_in_place(graph: GraphSpec, outputs: Mapping[str, str]) -> dict[str, str]:
    """Outputs that are written over inputs, of those that renew a state: output, then input."""
    names = {tensor.source.partition(":")[2]: tensor.name for tensor in graph.inputs}
    return {output: names[state] for output, state in outputs.items() if state in names}


def _array(
    tensor: TensorSpec,
    sizes: Mapping[str, int],
    rows: int,
    used: int,
    graph: GraphSpec,
    random: np.random.Generator,
) -> np.ndarray:
    shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
    kind = tensor.source.partition(":")[0]
    dtype = carrier(tensor.dtype)
    if kind in ("last_slot", "total", "used"):
        value = {"last_slot": used + rows - 1, "total": used + rows, "used": used}[kind]
        return np.full(shape, value, dtype)
    if kind == "logit_rows":
        return np.full(shape, rows - 1, dtype)
    if kind == "state":
        return np.zeros(shape, dtype)
    if kind == "rope_cos":
        return np.ones(shape, dtype)
    if kind == "rope_sin":
        return np.zeros(shape, dtype)
    if kind == "mask":
        mask = np.full(shape, graph.mask_value, dtype)
        mask[..., :used] = 0
        slots = shape[-1] - shape[-2]
        mask[..., slots:] = np.triu(np.full((rows, rows), graph.mask_value, dtype), 1)
        return mask
    if kind == "grid":
        return np.asarray([[1, *(graph.grid or (1, 1))]], dtype)
    return random.standard_normal(shape).astype(dtype)
