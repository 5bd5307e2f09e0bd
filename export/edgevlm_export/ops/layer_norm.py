"""Layer norm over the last axis: (x - mean) / deviation * weight + bias."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import Op, attribute, torch_op


@torch_op("layer_norm", fake=lambda x, *_: torch.empty_like(x))
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the last axis."""
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


def numpy_layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """Normalise the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(np.square(centred), axis=-1, keepdims=True) + eps)
    out: np.ndarray = centred / deviation * weight + bias
    return out


def _lower(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    epsilon = attribute(node, "eps")
    return [emit.one("LayerNormalization", *node.inputs, axis=-1, epsilon=epsilon, stash_type=1)]


OP = Op(
    name="layer_norm",
    overload=torch.ops.edgevlm.layer_norm.default,
    numpy=numpy_layer_norm,
    lowerings={"contrib": _lower, "standard": _lower},
)
