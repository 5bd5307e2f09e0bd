"""Attention of a few probes, head by head: torch, numpy and the graph agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgevlm_export.lower import lower
from edgevlm_export.ops import probe_heads
from edgevlm_export.ops.probe_attention import OP as PROBE_ATTENTION
from edgevlm_export.ops.probe_heads import OP as PROBE_HEADS
from edgevlm_export.plan import GraphPlan
from edgevlm_export.targets import TARGETS
from tests.export.running import captured, eager, lowered, op_graph, run, seeded, spec

# Shares of a softmax, at most 1 each, of products of 16 numbers in float32.
TOLERANCE = 2e-6
SIZE, PROBES, KEYS = 16, 3, 10
HEADS = [(3, 3), (4, 2), (4, 1), (1, 1)]


def inputs(
    heads: int,
    kv_heads: int,
    *,
    batch: int = 1,
    probes: int = PROBES,
    keys: int = KEYS,
    own_picture: bool = False,
    own_head: bool = False,
    causal: bool = False,
) -> dict[str, Tensor]:
    """`own_picture` and `own_head` say whether these have weights of their own."""
    tensors = {
        "q": seeded(batch, probes, heads * SIZE),
        "k": seeded(batch, keys, kv_heads * SIZE, seed=1),
        "weights": seeded(batch if own_picture else 1, heads if own_head else 1, probes, seed=2),
    }
    if causal:
        tensors["rows"] = torch.arange(keys - probes, keys) // 2 + 1
    return tensors


def options(heads: int, kv_heads: int) -> dict[str, Any]:
    return {"num_heads": heads, "num_kv_heads": kv_heads, "scale": 0.3}


def reference(tensors: dict[str, Tensor], **opts: Any) -> np.ndarray:
    arrays = {
        name: x.double().numpy() if x.is_floating_point() else x.numpy()
        for name, x in tensors.items()
    }
    out: np.ndarray = PROBE_HEADS.numpy(**arrays, **opts)
    return out


@pytest.mark.parametrize("target", ["ort", "static", "tensorrt"])
@pytest.mark.parametrize("causal", [False, True], ids=["every key", "causal"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_probe_heads(target: str, heads: int, kv_heads: int, causal: bool) -> None:
    opts = options(heads, kv_heads)
    for more in ({}, {"own_head": True}, {"probes": 1}, {"keys": 3}):
        tensors = inputs(heads, kv_heads, causal=causal, **more)
        expected = reference(tensors, **opts)
        (in_torch,) = eager(PROBE_HEADS, tensors, **opts)
        np.testing.assert_allclose(in_torch, expected, atol=TOLERANCE, rtol=0)
        (in_graph,) = lowered(PROBE_HEADS, target, tensors, **opts)
        np.testing.assert_allclose(in_graph, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", ["ort", "static"])
@pytest.mark.parametrize("own_picture", [False, True])
def test_several_pictures(target: str, own_picture: bool) -> None:
    tensors = inputs(4, 2, batch=3, own_picture=own_picture, own_head=True)
    expected = reference(tensors, **options(4, 2))
    for out in (
        eager(PROBE_HEADS, tensors, **options(4, 2))[0],
        lowered(PROBE_HEADS, target, tensors, **options(4, 2))[0],
    ):
        np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("causal", [False, True], ids=["every key", "causal"])
def test_heads_together_are_probe_attention(causal: bool) -> None:
    tensors = inputs(4, 2, batch=2, own_head=True, causal=causal)
    apart = eager(PROBE_HEADS, tensors, **options(4, 2))[0]
    together = eager(PROBE_ATTENTION, tensors, **options(4, 2))[0]
    np.testing.assert_allclose(apart.sum(1), together, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("causal", [False, True], ids=["every key", "causal"])
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_any_number_of_everything(heads: int, kv_heads: int, causal: bool, own_head: bool) -> None:
    shapes: dict[str, tuple[int | str, ...]] = {
        "q": ("B", "m", heads * SIZE),
        "k": ("B", "S", kv_heads * SIZE),
        "weights": ("B", heads if own_head else 1, "m"),
        "rows": ("m",),
    }
    more = {"own_picture": True, "own_head": own_head, "causal": causal}
    opts = options(heads, kv_heads)
    tensors = inputs(heads, kv_heads, **more)  # type: ignore[arg-type]
    graph = op_graph(PROBE_HEADS, tensors, shapes={name: shapes[name] for name in tensors}, **opts)
    model = lower(graph, TARGETS["ort"])
    for batch, probes, keys in ((1, 1, 5), (3, 2, 9), (1, 4, 33)):
        tensors = inputs(heads, kv_heads, batch=batch, probes=probes, keys=keys, **more)  # type: ignore[arg-type]
        (out,) = run(model, {name: x.numpy() for name, x in tensors.items()}).values()
        np.testing.assert_allclose(out, reference(tensors, **opts), atol=TOLERANCE, rtol=0)


class Scored(nn.Module):
    """The heads of a sequence, compared."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(32, 32)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        k = self.key(x)
        q = x.index_select(1, rows)
        weights = torch.full((1, 1, 2), 0.25)
        heads = probe_heads(torch.cat([q, q], dim=-1), k, weights, 4, 2, 0.5, rows)
        return heads / heads.amax(1, keepdim=True)


def test_captured() -> None:
    def plan(length: int | str) -> GraphPlan:
        given = (spec("x", (1, length, 32)), spec("rows", (2,), "int64"))
        return GraphPlan(name="score", inputs=given, outputs=(spec("y", (1, 4, length)),))

    # Every key is seen, so that no quotient is one of zeros.
    many = [(seeded(1, length, 32), torch.tensor([length - 1, length - 1])) for length in (5, 12)]
    captured(Scored(), plan("T"), "ort", *many, atol=1e-5)
    captured(Scored(), plan(5), "static", many[0], atol=1e-5)
