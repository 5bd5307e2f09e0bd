"""Rotations: orthogonal to the last bits, of entries of one size, the same for a seed."""

from __future__ import annotations

import pytest
import torch

from edgevlm.quant.rotate import hadamard, mixing_size
from edgevlm.quant.rtn import rtn
from tests.edgevlm.quant import slow

# Powers of two; both of Paley's constructions (q = 11, 19, 43, 59 and 5, 13, 17, 37); their doubles
# as widths of models have them.
WHOLE = [1, 2, 4, 64, 12, 20, 44, 60, 28, 36, 76, 160, 192, 240, 320, 576, 768, 896, 960]


@pytest.mark.parametrize("size", WHOLE)
def test_mixes_all_channels_alike(size: int) -> None:
    matrix = hadamard(size)
    assert matrix.dtype == torch.float64
    assert mixing_size(size) == size
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        matrix.abs(), torch.full_like(matrix, size**-0.5), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize(("size", "block"), [(3, 1), (6, 2), (52, 4), (184, 8), (688, 16)])
def test_other_sizes_mix_in_blocks(size: int, block: int) -> None:
    matrix = hadamard(size)
    assert mixing_size(size) == block
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12
    )
    places = torch.arange(size) // block
    is_inside = places[:, None] == places
    assert bool((matrix[~is_inside] == 0).all())
    torch.testing.assert_close(
        matrix[is_inside].abs(), torch.full((size * block,), block**-0.5, dtype=torch.float64)
    )


def test_the_seed_decides_the_signs() -> None:
    assert torch.equal(hadamard(60, seed=3), hadamard(60, seed=3))
    assert not torch.equal(hadamard(60, seed=3), hadamard(60, seed=4))
    signs = hadamard(64, seed=3) / hadamard(64, seed=4)
    assert bool((signs == signs[:, :1]).all())
    assert 16 < int((signs[:, 0] > 0).sum()) < 48


def test_spreads_outliers_and_keeps_products() -> None:
    weight, x = slow.drawn_weight(16, 96).double(), slow.drawn_inputs(50, 96).double()
    weight[:, 11] *= 30.0
    rotation = hadamard(96)
    rotated = weight @ rotation
    torch.testing.assert_close((x @ rotation) @ rotated.T, x @ weight.T, rtol=0, atol=1e-9)

    def error(weight: torch.Tensor) -> float:
        tensor = rtn(weight.float(), bits=4, group_size=0, symmetric=True)
        return float((tensor.dequantize() - weight).square().sum())

    assert error(rotated) < 0.3 * error(weight)


def test_refuses_no_channels() -> None:
    with pytest.raises(ValueError, match=r"^a rotation of 0 channels$"):
        hadamard(0)
