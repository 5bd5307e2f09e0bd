"""One linear map, rounded: the scheme's integers by the recipe's method, and its static ranges."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgevlm.errors import PassError
from edgevlm.model.quantized import QuantEmbedding, QuantLinear
from edgevlm.quant.affine import Float8Tensor, QuantTensor, float8_scales, to_float8
from edgevlm.quant.gptq import gptq
from edgevlm.quant.hqq import hqq
from edgevlm.quant.options import SchemeOptions
from edgevlm.quant.ranges import affine_of
from edgevlm.quant.refine import refit_scales
from edgevlm.quant.rtn import rtn
from edgevlm.quant.spec import DTYPE_BITS, ActivationQuant, Scheme
from edgevlm.quant.statistics import Statistics

__all__ = ["quantized_linear", "quantized_table"]

FEW_BITS = 4
"""So few bear some clipping: what a coarse grid loses at its ends it gains between them."""


def quantized_linear(
    linear: nn.Linear,
    scheme: Scheme,
    options: SchemeOptions,
    statistics: Statistics | None,
    *,
    site: str,
) -> QuantLinear:
    """A quantized map in the place of a float one.

    Raises PassError where the weights hold NaN or infinity, or the samples never reached the site.
    """
    weight = linear.weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise PassError(
            "its weights hold NaN or infinity",
            name="quantize",
            site=site,
            hint="check the checkpoint, and the passes before this one",
        )
    rows, columns = weight.shape
    module = QuantLinear(rows, columns, linear.bias is not None, scheme)
    rounded = _rounded(weight, scheme, options, statistics)
    _set(module, "weight", rounded.values)
    _set(module, "scale", rounded.scale)
    if isinstance(rounded, QuantTensor) and rounded.zero is not None:
        _set(module, "zero", rounded.zero)
    if linear.bias is not None:
        bias = linear.bias.detach().clone()
        mean = None if statistics is None else statistics.mean
        if mean is not None:
            bias += (weight - rounded.dequantize()) @ mean
        _set(module, "bias", bias)
    activations = scheme.activations
    if activations is not None and activations.is_static:
        assert statistics is not None
        assert statistics.range is not None
        scale, zero = _constants(statistics, activations, options, site)
        _set(module, "x_scale", torch.tensor(scale, dtype=torch.float32))
        _set(module, "x_zero", torch.tensor(zero, dtype=torch.int32))
    return module


def quantized_table(table: nn.Module, scheme: Scheme) -> QuantEmbedding:
    """A quantized table in the place of a float one."""
    weight = table.get_parameter("weight").detach().float()
    rows, width = weight.shape
    module = QuantEmbedding(rows, width, scheme)
    rounded = _rounded(weight, scheme, SchemeOptions(scheme="w8a16"), None)
    _set(module, "weight", rounded.values)
    _set(module, "scale", rounded.scale)
    return module


def _rounded(
    weight: Tensor, scheme: Scheme, options: SchemeOptions, statistics: Statistics | None
) -> QuantTensor | Float8Tensor:
    weights = scheme.weights
    if weights.dtype.startswith("float8"):
        dtype = getattr(torch, weights.dtype)
        return to_float8(weight, float8_scales(weight, dtype), dtype=dtype)
    bits, size, is_symmetric = weights.bits, weights.group_size, weights.symmetric
    ranges = options.ranges or ("mse" if bits <= FEW_BITS else "minmax")
    if options.method == "hqq":
        return hqq(weight, bits=bits, group_size=size, symmetric=is_symmetric, ranges=ranges)
    if options.method == "rtn":
        return rtn(weight, bits=bits, group_size=size, symmetric=is_symmetric, ranges=ranges)
    assert statistics is not None
    assert statistics.products is not None
    found = gptq(
        weight,
        statistics.products,
        bits=bits,
        group_size=size,
        symmetric=is_symmetric,
        ranges=ranges,
        act_order=True,
    )
    return refit_scales(weight, found.tensor, statistics.products)


def _constants(
    statistics: Statistics, activations: ActivationQuant, options: SchemeOptions, site: str
) -> tuple[float, int]:
    """The scale and zero point of static activations."""
    assert statistics.range is not None
    seen = statistics.range
    if options.activation_ranges == "percentile":
        low, high = seen.percentile()
    elif options.activation_ranges == "mse":
        low, high = seen.mse(bits=DTYPE_BITS[activations.dtype], symmetric=activations.symmetric)
    else:
        low, high = seen.minmax()
    if activations.dtype.startswith("float8"):
        largest = max(abs(low), abs(high), torch.finfo(torch.float32).tiny)
        return largest / torch.finfo(getattr(torch, activations.dtype)).max, 0
    bits = DTYPE_BITS[activations.dtype]
    return affine_of(low, high, bits=bits, symmetric=activations.symmetric)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=False))
