"""What this machine can do at best: bytes read and float32 products, on all its cores.

A figure beside its limit says how much is left to gain. The speed of a shared machine drifts, so a
limit is measured before and after what it limits, and the better of the two counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import onnx
import torch

_BYTES = 1 << 30
_SIDE = 2048
_TRIALS = 20


def read_bytes_per_ms() -> float:
    """The best rate at which 1 GiB of memory is read and summed up."""
    values = torch.ones(_BYTES // 4)
    return _BYTES / _best_ms(values.sum)


def flops_per_ms() -> float:
    """The best rate of a square float32 matrix product."""
    left, right = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
    return 2 * _SIDE**3 / _best_ms(lambda: left @ right)


def weight_bytes(graph: Path) -> int:
    """Bytes of a graph's initializers, each of which one run reads at least once."""
    model = onnx.load(graph, load_external_data=False)
    return sum(
        int(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    )


def transformer_flops(rows: int, layers: int, width: int, inner: int) -> float:
    """Products of a ViT's layers: four projections, two of the MLP, scores and values."""
    return layers * (2 * rows * (4 * width**2 + 2 * width * inner) + 4 * rows**2 * width)


def _best_ms(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)
