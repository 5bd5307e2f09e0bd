"""Rotary positions: torch, numpy and ONNX Runtime agree, whole heads or a part."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from edgevlm_export.ops.rotary import OP as ROTARY
from tests.export.running import eager, lowered, seeded

TOLERANCE = 2e-6  # sums of two float32 products of size 3
HEADS, SIZE, ROWS = 3, 16, 5


def inputs(pairs: int, table_rows: int = ROWS) -> dict[str, Tensor]:
    angles = seeded(table_rows, pairs, seed=1)
    return {"x": seeded(1, ROWS, HEADS * SIZE), "cos": angles.cos(), "sin": angles.sin()}


@pytest.mark.parametrize("pairs", [8, 6, 4], ids=["whole", "three quarters", "half"])
@pytest.mark.parametrize("target", ["ort", "static"])
def test_rotary(target: str, pairs: int) -> None:
    # More rows in the table than in x: row r of x turns by row r of the table.
    tensors = inputs(pairs, ROWS + 3)
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    expected = ROTARY.numpy(**arrays, num_heads=HEADS)
    np.testing.assert_allclose(eager(ROTARY, tensors, num_heads=HEADS)[0], expected, atol=TOLERANCE)
    (out,) = lowered(ROTARY, target, tensors, num_heads=HEADS)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=0)


def test_pairs_turn_as_complex_numbers() -> None:
    tensors = inputs(8)
    x = tensors["x"].numpy().reshape(ROWS, HEADS, SIZE)
    out = eager(ROTARY, tensors, num_heads=HEADS)[0].reshape(ROWS, HEADS, SIZE)
    turn = tensors["cos"].numpy() + 1j * tensors["sin"].numpy()
    after = (x[..., :8] + 1j * x[..., 8:]) * turn[:, None]
    np.testing.assert_allclose(out[..., :8], after.real, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(out[..., 8:], after.imag, atol=TOLERANCE, rtol=0)


def test_partial_rotation_leaves_the_rest_of_a_head() -> None:
    tensors = inputs(4)
    out = eager(ROTARY, tensors, num_heads=HEADS)[0].reshape(ROWS, HEADS, SIZE)
    x = tensors["x"].numpy().reshape(ROWS, HEADS, SIZE)
    np.testing.assert_array_equal(out[..., 8:], x[..., 8:])
