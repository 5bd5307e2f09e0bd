"""A projection of the last axis: x W^T + b, which torch writes as `aten.linear`.

Both forms take the weight as [K, N], the layout of ONNX MatMul; it is transposed while it is
written, so nobody holds two copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import Op, tensors


def numpy_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Multiply by weight [N, K]."""
    out: np.ndarray = x @ weight.T
    return out if bias is None else out + bias


def lower(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    """MatMul with the weight transposed, then Add."""
    x, weight, bias = tensors(node, 3)
    assert weight is not None
    out = emit.one("MatMul", x, transposed(emit, weight))
    if bias is not None:
        out = emit.one("Add", out, bias, part="bias")
    return [out]


def transposed(emit: Emitter, weight: ir.Value) -> ir.Value:
    """The initializer weight^T, evaluated when it is written."""
    tensor = weight.const_value
    assert tensor is not None, f"the weight of {emit.site} is not a constant"
    name = f"{weight.name}.T"

    def make() -> ir.TensorProtocol:
        rows, columns = tensor.shape.numpy()
        return ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=name),
            dtype=tensor.dtype,
            shape=ir.Shape([columns, rows]),
            name=name,
        )

    return emit.initializer(name, make)


OP = Op(
    name="linear",
    overload=torch.ops.aten.linear.default,
    numpy=numpy_linear,
    lowerings={"contrib": lower, "standard": lower},
)
