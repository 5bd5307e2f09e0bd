"""The gated activation of a gated MLP: act(gate) * up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgevlm_export.emit import Emitter
from edgevlm_export.ops.activate import (
    ACTIVATIONS,
    contrib_activation,
    numpy_activate,
    standard_activation,
)
from edgevlm_export.ops.op import Op, attribute, torch_op


@torch_op("gated", fake=lambda gate, *_: torch.empty_like(gate))
def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Multiply the activated gate by the up projection."""
    return ACTIVATIONS[kind](gate) * up


def numpy_gated(gate: np.ndarray, up: np.ndarray, kind: str) -> np.ndarray:
    """Multiply the activated gate by the up projection."""
    out: np.ndarray = numpy_activate(gate, kind) * up
    return out


def _contrib(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    gate, up = node.inputs
    assert gate is not None
    return [emit.one("Mul", contrib_activation(emit, gate, attribute(node, "kind")), up)]


def _standard(emit: Emitter, node: ir.Node) -> Sequence[ir.Value]:
    gate, up = node.inputs
    assert gate is not None
    return [emit.one("Mul", standard_activation(emit, gate, attribute(node, "kind")), up)]


OP = Op(
    name="gated",
    overload=torch.ops.edgevlm.gated.default,
    numpy=numpy_gated,
    lowerings={"contrib": _contrib, "standard": _standard},
)
