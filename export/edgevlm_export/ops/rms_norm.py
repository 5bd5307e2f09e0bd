"""Root-mean-square norm over the last axis: x / rms(x) * weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import Op, attribute, torch_op


@torch_op("rms_norm", fake=lambda x, *_: torch.empty_like(x))
def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """Normalise the last axis, in float32; `unit_offset` scales by weight + 1 (Gemma)."""
    variance = x.float().square().mean(dim=-1, keepdim=True)
    normed = (x.float() * torch.rsqrt(variance + eps)).to(x.dtype)
    return normed * (weight + 1 if unit_offset else weight)


def numpy_rms_norm(
    x: np.ndarray, weight: np.ndarray, eps: float, unit_offset: bool = False
) -> np.ndarray:
    """Normalise the last axis."""
    rms = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)
    out: np.ndarray = x / rms * (weight + 1 if unit_offset else weight)
    return out


def _contrib(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    x = node.inputs[0]
    return [
        emit.one(
            "SimplifiedLayerNormalization",
            x,
            _scale(emit, node),
            axis=-1,
            epsilon=attribute(node, "eps"),
            stash_type=1,
        )
    ]


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    x = node.inputs[0]
    assert x is not None
    square = emit.one("Mul", x, x, part="square")
    mean = emit.one("ReduceMean", square, emit.ints(-1), part="mean", keepdims=1)
    rms = emit.one("Sqrt", emit.one("Add", mean, emit.scalar(attribute(node, "eps"), x)))
    return [emit.one("Mul", emit.one("Div", x, rms), _scale(emit, node), part="scale")]


def _scale(emit: Emitter, node: ir.Node) -> ir.Value:
    weight = node.inputs[1]
    assert weight is not None
    if not attribute(node, "unit_offset"):
        return weight
    tensor = weight.const_value
    assert tensor is not None, f"the weight of {emit.site} is not a constant"
    name = f"{weight.name}.plus_one"
    return emit.initializer(name, lambda: ir.tensor(tensor.numpy() + 1, name=name))


OP = Op(
    name="rms_norm",
    overload=torch.ops.edgevlm.rms_norm.default,
    numpy=numpy_rms_norm,
    lowerings={"contrib": _contrib, "standard": _standard},
)
