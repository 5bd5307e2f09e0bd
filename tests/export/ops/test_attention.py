"""Stateless attention: torch, numpy and ONNX Runtime agree in every lowering."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm_export.ops.attention import OP as ATTENTION
from edgevlm_export.ops.attention import numpy_attention
from tests.export.running import eager, lowered, seeded

TOLERANCE = 3e-6  # averages of values of size 3
SIZE, ROWS = 16, 7


def inputs(heads: int, kv_heads: int, batch: int = 2) -> dict[str, Tensor]:
    widths = {"q": heads * SIZE, "k": kv_heads * SIZE, "v": kv_heads * SIZE}
    return {
        name: seeded(batch, ROWS, width, seed=i) for i, (name, width) in enumerate(widths.items())
    }


def options(heads: int, kv_heads: int, causal: bool = False) -> dict[str, Any]:
    return {"num_heads": heads, "num_kv_heads": kv_heads, "scale": 0.3, "causal": causal}


def assert_equals_definition(target: str, tensors: dict[str, Tensor], **opts: Any) -> np.ndarray:
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    expected = numpy_attention(**({"k": None, "v": None} | arrays), **opts)  # type: ignore[arg-type]
    np.testing.assert_allclose(eager(ATTENTION, tensors, **opts)[0], expected, atol=TOLERANCE)
    (out,) = lowered(ATTENTION, target, tensors, **opts)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)
    return expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("target", "heads", "kv_heads"),
    [("ort", 3, 3), ("ort", 4, 2), ("static", 3, 3), ("static", 6, 2), ("static", 4, 1)],
)
def test_attention(target: str, heads: int, kv_heads: int, causal: bool) -> None:
    assert_equals_definition(target, inputs(heads, kv_heads), **options(heads, kv_heads, causal))


@pytest.mark.parametrize("target", ["ort", "static"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])
def test_mask_is_added(target: str, heads: int, kv_heads: int) -> None:
    mask = torch.where(seeded(1, 1, ROWS, ROWS, seed=9) > 0.5, -60000.0, 0.0)
    tensors = {**inputs(heads, kv_heads), "mask": mask}
    assert_equals_definition(target, tensors, **options(heads, kv_heads))


@pytest.mark.parametrize("target", ["ort", "static"])
def test_packed_rows_are_q_then_k_then_v(target: str) -> None:
    apart = inputs(3, 3)
    packed = {"q": torch.cat(list(apart.values()), dim=-1)}
    expected = assert_equals_definition(target, packed, **options(3, 3))
    arrays = {name: tensor.double().numpy() for name, tensor in apart.items()}
    np.testing.assert_allclose(expected, numpy_attention(**arrays, **options(3, 3)), atol=1e-12)


def test_one_head_against_the_definition() -> None:
    q, k, v = (seeded(1, 2, 4, seed=i).double().numpy() for i in range(3))
    scores = np.array([[q[0, i] @ k[0, j] / 2 for j in range(2)] for i in range(2)])
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(numpy_attention(q, k, v, 1, 1, 0.5)[0], weights @ v[0], atol=1e-12)
