"""Round to nearest: the weights alone decide."""

from __future__ import annotations

from torch import Tensor

from edgevlm.quant.affine import QuantTensor, quantize
from edgevlm.quant.ranges import RangeMethod, weight_scales


def rtn(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    ranges: RangeMethod = "minmax",
    narrow: bool = False,
) -> QuantTensor:
    """Round weights [N, K] to the nearest of the grid that `ranges` gives each group."""
    scale, zero = weight_scales(
        weight,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        method=ranges,
        narrow=narrow,
    )
    return quantize(weight, scale, zero, bits=bits, group_size=group_size, narrow=narrow)
