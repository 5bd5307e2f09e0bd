"""Attention over a cache and new rows with a mask: static chunks equal the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm_export.ops import CLOSED
from edgevlm_export.ops.masked_attention import OP as MASKED_ATTENTION
from tests.export.running import eager, lowered, seeded

TOLERANCE = 3e-6  # averages of values of size 3
SIZE, SLOTS = 16, 12


def inputs(rows: int, used: int, heads: int, kv_heads: int, pairs: int = 8) -> dict[str, Tensor]:
    """Rows after `used` slots, causal; what the other slots hold is closed by the mask."""
    mask = torch.full((1, 1, rows, SLOTS + rows), CLOSED)
    mask[..., :used] = 0
    mask[..., SLOTS:] = torch.full((rows, rows), CLOSED).triu(1)
    angles = seeded(rows, pairs, seed=3) * 5
    return {
        "q": seeded(1, rows, (heads + 2 * kv_heads) * SIZE),
        "past_key": seeded(1, kv_heads, SLOTS, SIZE, seed=1),
        "past_value": seeded(1, kv_heads, SLOTS, SIZE, seed=2),
        "mask": mask,
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


def options(heads: int, kv_heads: int, softcap: float = 0.0) -> dict[str, Any]:
    return {"num_heads": heads, "num_kv_heads": kv_heads, "scale": 0.3, "softcap": softcap}


def reference(tensors: dict[str, Tensor], **opts: Any) -> list[np.ndarray]:
    arrays: dict[str, Any] = dict.fromkeys(MASKED_ATTENTION.inputs)
    arrays |= {name: tensor.double().numpy() for name, tensor in tensors.items()}
    return list(MASKED_ATTENTION.numpy(**arrays, **opts))


def assert_equals_definition(tensors: dict[str, Tensor], **opts: Any) -> None:
    expected = reference(tensors, **opts)
    in_torch = eager(MASKED_ATTENTION, tensors, **opts)
    in_graph = lowered(MASKED_ATTENTION, "static", tensors, **opts)
    for outputs in (in_torch, in_graph):
        for out, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(out, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("rows", "used", "heads", "kv_heads", "pairs", "softcap"),
    [
        (1, 5, 4, 2, 8, 0.0),
        (8, 0, 4, 2, 8, 0.0),
        (8, 5, 4, 4, 8, 0.0),
        (8, 5, 6, 1, 8, 0.0),
        (8, 5, 4, 2, 4, 0.0),
        (8, 5, 4, 2, 8, 2.0),
    ],
    ids=["decode", "first", "no groups", "one group", "partial rotary", "softcap"],
)
def test_eager_and_static_equal_the_definition(
    rows: int, used: int, heads: int, kv_heads: int, pairs: int, softcap: float
) -> None:
    tensors = inputs(rows, used, heads, kv_heads, pairs)
    assert_equals_definition(tensors, **options(heads, kv_heads, softcap))


def test_without_rotary_and_with_three_tensors() -> None:
    tensors = inputs(8, 5, 4, 2)
    parts = torch.split(tensors["q"], [4 * SIZE, 2 * SIZE, 2 * SIZE], dim=-1)
    tensors |= {name: part.contiguous() for name, part in zip("qkv", parts, strict=True)}
    assert_equals_definition(tensors, **options(4, 2))
    del tensors["cos"], tensors["sin"]
    assert_equals_definition(tensors, **options(4, 2))


def test_a_tree_equals_its_paths() -> None:
    """Rows 1 and 2 are both children of row 0: each sees row 0 and itself, not its sibling."""
    tensors = inputs(3, 5, 4, 2)
    tensors["mask"][..., 2, SLOTS + 1] = CLOSED
    tree = lowered(MASKED_ATTENTION, "static", tensors, **options(4, 2))[0]
    for path in ([0, 1], [0, 2]):
        alone = inputs(2, 5, 4, 2) | {"q": tensors["q"][:, path]}
        alone |= {name: tensors[name][path] for name in ("cos", "sin")}
        chain = lowered(MASKED_ATTENTION, "static", alone, **options(4, 2))[0]
        np.testing.assert_allclose(tree[:, path], chain, atol=TOLERANCE, rtol=0)


def test_a_closed_padding_row_is_finite_and_changes_nothing() -> None:
    tensors = inputs(8, 5, 4, 2)
    whole = reference(tensors, **options(4, 2))[0]
    tensors["mask"][..., 7, :] = CLOSED
    out = lowered(MASKED_ATTENTION, "static", tensors, **options(4, 2))[0]
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:, :7], whole[:, :7], atol=TOLERANCE, rtol=0)
