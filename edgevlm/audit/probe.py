"""Probes: tiny products that show what the kernels of this machine really do.

`accuracy_level` of MatMulNBits is only a wish: a kernel of that level may be missing for a block or
a bit width, or because a session packs no weights, and then activations silently stay float. And
whether products of eight bits saturate is a property of the processor. So both are measured, once
for each kernel, in sessions of the options that the graph is loaded with.

What rounds activations is seen with weights of 1 and two rows of small numbers e, the first of
which begins with a 1. Rounded to eight bits, numbers below 1/254 of the largest vanish:

    float           1 + (2 B - 1) e     2 B e          B columns of a block, two blocks
    group           1 + B e             2 B e          e is the largest of all blocks but one
    token           1                   2 B e
    tensor          1                   0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edgevlm.audit.weights import MICROSOFT

__all__ = ["Kernels"]

_SMALL = np.float32(0.3 / 127)
_NUM_ROWS = 16  # outputs of a probe, as many as kernels take at once
_COLUMNS = 64


class Kernels:
    """The kernels of this machine, in sessions with the options that `options` makes."""

    def __init__(self, options: Callable[[], Any]) -> None:
        """Measure nothing yet."""
        self._options = options
        self._known: dict[tuple[int, int, int, str], str] = {}
        self._saturates: bool | None = None

    def nbits_rounding(self, *, bits: int, block: int, level: int, zeros: str) -> str:
        """What shares a scale where MatMulNBits rounds A to int8; empty where it does not.

        `zeros` is the dtype of the zero points, empty without any.
        """
        key = (bits, block, level, zeros)
        if key not in self._known:
            self._known[key] = self._measure(bits, block, level, zeros)
        return self._known[key]

    def saturates(self) -> bool:
        """Whether a product of uint8 by int8 is wrong where two neighbours pass 16 bits."""
        if self._saturates is None:
            a = np.full((4, _COLUMNS), 255, np.uint8)
            constants: dict[str, NDArray[Any]] = {
                "b": np.full((_COLUMNS, _NUM_ROWS), 127, np.int8),
                "one": np.ones((), np.float32),
            }
            found = self._run("MatMulIntegerToFloat", a, ["a", "b", "one", "one"], constants, {})
            self._saturates = bool((found != _COLUMNS * 255 * 127).any())
        return self._saturates

    def _measure(self, bits: int, block: int, level: int, zeros: str) -> str:
        middle = 2 ** (bits - 1)
        sizes = {"K": 2 * block, "N": _NUM_ROWS, "bits": bits, "block_size": block}
        constants: dict[str, NDArray[Any]] = {
            "b": np.full((_NUM_ROWS, 2, block * bits // 8), _packed(middle + 1, bits), np.uint8),
            "scales": np.ones((_NUM_ROWS, 2), np.float32),
        }
        if zeros == "int8":
            shape = (_NUM_ROWS, -(-2 * bits // 8))
            constants["zeros"] = np.full(shape, _packed(middle, bits), np.uint8)
        elif zeros:
            constants["zeros"] = np.full((_NUM_ROWS, 2), middle, np.float32)
        a = np.full((2, 2 * block), _SMALL)
        a[0, 0] = 1
        attributes = sizes | {"accuracy_level": level}
        found = self._run("MatMulNBits", a, ["a", *constants], constants, attributes)
        first, second = found[:, 0]
        e = float(_SMALL)
        if abs(second) < e:
            return "tensor"
        sums = {"token": 1.0, f"group:{block}": 1 + block * e, "": 1 + (2 * block - 1) * e}
        return min(sums, key=lambda name: abs(sums[name] - first))

    def _run(
        self,
        op_type: str,
        a: NDArray[Any],
        inputs: list[str],
        constants: Mapping[str, NDArray[Any]],
        attributes: Mapping[str, int],
    ) -> NDArray[np.float32]:
        """Run one node on A."""
        values = {
            name: ir.Value(name=name, const_value=ir.tensor(constants[name], name=name))
            for name in constants
        }
        values["a"] = ir.Value(
            name="a", type=ir.TensorType(ir.DataType.from_numpy(a.dtype)), shape=ir.Shape(a.shape)
        )
        node = ir.node(
            op_type,
            [values[name] for name in inputs],
            attributes,
            domain=MICROSOFT,
            outputs=[ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT))],
        )
        graph = ir.Graph(
            [values["a"]],
            list(node.outputs),
            nodes=[node],
            initializers=[values[name] for name in constants],
            opset_imports={"": 21, MICROSOFT: 1},
            name="probe",
        )
        model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
        session = ort.InferenceSession(model, self._options(), providers=["CPUExecutionProvider"])
        found: NDArray[np.float32] = session.run(None, {"a": a})[0]
        return found


def _packed(number: int, bits: int) -> int:
    """A byte of equal numbers."""
    return sum(number << shift for shift in range(0, 8, bits))
