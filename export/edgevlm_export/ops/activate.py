"""The activations between two projections."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.op import MICROSOFT, Op, attribute, torch_op

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": nn.functional.relu,
}


@torch_op("activate", fake=lambda x, kind: torch.empty_like(x))
def activate(x: Tensor, kind: str) -> Tensor:
    """Apply one activation of `ACTIVATIONS`, elementwise."""
    return ACTIVATIONS[kind](x)


def numpy_activate(x: np.ndarray, kind: str) -> np.ndarray:
    """Apply one activation, elementwise."""
    if kind == "relu":
        out: np.ndarray = np.maximum(x, 0)
    elif kind == "gelu":
        error = np.array([math.erf(v / math.sqrt(2)) for v in x.ravel().tolist()])
        out = 0.5 * x * (1 + error.reshape(x.shape))
    elif kind == "gelu_tanh":
        out = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    else:
        alpha = {"silu": 1.0, "quick_gelu": 1.702}[kind]
        out = x / (1 + np.exp(-alpha * x))
    cast: np.ndarray = out.astype(x.dtype)
    return cast


def contrib_activation(emit: Emitter, x: ir.Value, kind: str) -> ir.Value:
    """One fused node."""
    if kind == "relu":
        return emit.one("Relu", x)
    if kind in ("gelu", "gelu_tanh"):
        return emit.one("Gelu" if kind == "gelu" else "FastGelu", x, domain=MICROSOFT)
    alpha = {"silu": 1.0, "quick_gelu": 1.702}[kind]
    return emit.one("QuickGelu", x, domain=MICROSOFT, alpha=alpha)


def standard_activation(emit: Emitter, x: ir.Value, kind: str) -> ir.Value:
    """The activation out of elementary functions."""

    def scaled(value: ir.Value, factor: float) -> ir.Value:
        return emit.one("Mul", value, emit.scalar(factor, x))

    if kind == "relu":
        return emit.one("Relu", x)
    if kind == "silu":
        return emit.one("Mul", x, emit.one("Sigmoid", x))
    if kind == "quick_gelu":
        return emit.one("Mul", x, emit.one("Sigmoid", scaled(x, 1.702)))
    if kind == "gelu":
        bend = emit.one("Erf", scaled(x, math.sqrt(0.5)))
    else:
        cube = emit.one("Mul", emit.one("Mul", x, x), x)
        inner = emit.one("Add", x, scaled(cube, 0.044715))
        bend = emit.one("Tanh", scaled(inner, math.sqrt(2 / math.pi)))
    gate = emit.one("Add", bend, emit.scalar(1.0, x))
    return scaled(emit.one("Mul", x, gate), 0.5)


def _contrib(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    x = node.inputs[0]
    assert x is not None
    return [contrib_activation(emit, x, attribute(node, "kind"))]


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    x = node.inputs[0]
    assert x is not None
    return [standard_activation(emit, x, attribute(node, "kind"))]


OP = Op(
    name="activate",
    overload=torch.ops.edgevlm.activate.default,
    numpy=numpy_activate,
    lowerings={"contrib": _contrib, "standard": _standard},
)
