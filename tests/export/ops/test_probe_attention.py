"""Attention of a few probes: torch, numpy and the graph agree, however many keys there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgevlm_export.lower import lower
from edgevlm_export.ops import probe_attention
from edgevlm_export.ops.attention import numpy_attention
from edgevlm_export.ops.probe_attention import OP as PROBE_ATTENTION
from edgevlm_export.plan import GraphPlan
from edgevlm_export.targets import TARGETS
from tests.export.running import captured, eager, lowered, op_graph, run, seeded, spec

# Tens of shares of a softmax, at most 1 each, of products of 16 numbers in float32.
TOLERANCE = 3e-6
SIZE, PROBES, KEYS = 16, 3, 10
HEADS = [(3, 3), (4, 2), (4, 1), (1, 1)]


def inputs(
    heads: int,
    kv_heads: int,
    *,
    batch: int = 1,
    probes: int = PROBES,
    keys: int = KEYS,
    weights: tuple[bool, bool] = (False, True),
    causal: bool = False,
) -> dict[str, Tensor]:
    """`weights` says whether pictures and heads have weights of their own."""
    own_picture, own_head = weights
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
    out: np.ndarray = PROBE_ATTENTION.numpy(**arrays, **opts)
    return out


def equals_definition(target: str, tensors: dict[str, Tensor], **opts: Any) -> None:
    expected = reference(tensors, **opts)
    (in_torch,) = eager(PROBE_ATTENTION, tensors, **opts)
    np.testing.assert_allclose(in_torch, expected, atol=TOLERANCE, rtol=0)
    (in_graph,) = lowered(PROBE_ATTENTION, target, tensors, **opts)
    np.testing.assert_allclose(in_graph, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", ["ort", "static", "tensorrt"])
@pytest.mark.parametrize("causal", [False, True], ids=["every key", "causal"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_probe_attention(target: str, heads: int, kv_heads: int, causal: bool) -> None:
    tensors = inputs(heads, kv_heads, causal=causal)
    equals_definition(target, tensors, **options(heads, kv_heads))


@pytest.mark.parametrize("target", ["ort", "static"])
@pytest.mark.parametrize("own_picture", [False, True])
@pytest.mark.parametrize("own_head", [False, True])
def test_weights_are_shared_or_not(target: str, own_picture: bool, own_head: bool) -> None:
    tensors = inputs(4, 2, batch=2, weights=(own_picture, own_head))
    equals_definition(target, tensors, **options(4, 2))


@pytest.mark.parametrize("target", ["ort", "static"])
def test_one_probe_and_one_key(target: str) -> None:
    equals_definition(target, inputs(4, 2, probes=1), **options(4, 2))
    equals_definition(target, inputs(4, 2, keys=1), **options(4, 2))


def test_hidden_keys_score_nothing() -> None:
    tensors = {**inputs(4, 2), "rows": torch.tensor([0, 2, 6])}
    for out in (
        eager(PROBE_ATTENTION, tensors, **options(4, 2))[0],
        lowered(PROBE_ATTENTION, "static", tensors, **options(4, 2))[0],
    ):
        assert np.all(out[:, 7:] == 0)
        assert np.all(out[:, :7] != 0)


def test_the_scores_are_those_of_attention() -> None:
    tensors = inputs(4, 2)
    q, k = (tensors[name].double().numpy() for name in ("q", "k"))
    # Attention to values that are rows of the unit matrix gives its own weights.
    unit = np.tile(np.eye(KEYS), (1, 1, 2))
    padded = np.zeros((1, KEYS, 2, SIZE))
    padded[..., :KEYS] = unit.reshape(1, KEYS, 2, KEYS)
    seen = numpy_attention(q, k, padded.reshape(1, KEYS, -1), **options(4, 2))
    shares = seen.reshape(1, PROBES, 4, SIZE)[..., :KEYS]
    expected = np.einsum("bmhs,bhm->bs", shares, tensors["weights"].double().numpy())
    # Both in float64.
    np.testing.assert_allclose(reference(tensors, **options(4, 2)), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [False, True], ids=["every key", "causal"])
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_any_number_of_everything(heads: int, kv_heads: int, causal: bool, own_head: bool) -> None:
    weights = (True, own_head)
    shapes: dict[str, tuple[int | str, ...]] = {
        "q": ("B", "m", heads * SIZE),
        "k": ("B", "S", kv_heads * SIZE),
        "weights": ("B", heads if own_head else 1, "m"),
        "rows": ("m",),
    }
    tensors = inputs(heads, kv_heads, weights=weights, causal=causal)
    opts = options(heads, kv_heads)
    graph = op_graph(
        PROBE_ATTENTION, tensors, shapes={name: shapes[name] for name in tensors}, **opts
    )
    model = lower(graph, TARGETS["ort"])
    for batch, probes, keys in ((1, 1, 5), (3, 2, 9), (1, 4, 33)):
        tensors = inputs(
            *(heads, kv_heads),
            batch=batch,
            probes=probes,
            keys=keys,
            weights=weights,
            causal=causal,
        )
        (out,) = run(model, {name: x.numpy() for name, x in tensors.items()}).values()
        np.testing.assert_allclose(out, reference(tensors, **opts), atol=TOLERANCE, rtol=0)


class Scored(nn.Module):
    """A sequence scored by its last row."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(32, 32)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        k = self.key(x)
        q = x.index_select(1, rows)
        weights = torch.full((1, 1, 2), 0.25)
        return probe_attention(torch.cat([q, q], dim=-1), k, weights, 4, 2, 0.5, rows) * 2


def test_captured() -> None:
    def plan(length: int | str) -> GraphPlan:
        given = (spec("x", (1, length, 32)), spec("rows", (2,), "int64"))
        return GraphPlan(name="score", inputs=given, outputs=(spec("y", (1, length)),))

    many = [(seeded(1, length, 32), torch.tensor([1, length - 1])) for length in (5, 12)]
    captured(Scored(), plan("T"), "ort", *many, atol=TOLERANCE)
    captured(Scored(), plan(5), "static", many[0], atol=TOLERANCE)
