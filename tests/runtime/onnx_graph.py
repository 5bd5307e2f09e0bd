"""Hand-made ONNX graphs for tests: nodes one by one, and the manifest's view of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgevlm_runtime.manifest import EngineSpec, GraphSpec, TensorSpec

OPSET = 19


class OnnxGraph:
    """A graph in the making. Values are named by the node that gives them."""

    def __init__(self, folder: Path, name: str, role: str) -> None:
        self.folder, self.name, self.role = folder, name, role
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def input(self, name: str, dtype: str, shape: tuple[int | str, ...], source: str) -> str:
        self.inputs.append(TensorSpec(name=name, dtype=dtype, shape=shape, source=source))
        return name

    def output(self, value: str, name: str, dtype: str, shape: tuple[int | str, ...]) -> None:
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(TensorSpec(name=name, dtype=dtype, shape=shape))

    def const(self, array: NDArray[Any]) -> str:
        name = f"constant.{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(
        self, op: str, *inputs: str, domain: str = "", outputs: tuple[str, ...] = (), **attrs: Any
    ) -> str:
        outputs = outputs or (f"{op}.{len(self._nodes)}",)
        self._nodes.append(
            helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attrs)
        )
        return outputs[0]

    def filled(self, shape: str, number: int) -> str:
        value = numpy_helper.from_array(np.array([number], np.int64))
        return self.node("ConstantOfShape", shape, value=value)

    def slice(self, value: str, axis: int, begin: int, end: int) -> str:
        bounds = (self.const(np.array([number])) for number in (begin, end, axis))
        return self.node("Slice", value, *bounds)

    def finish(self, *, options: dict[str, str] | None = None, **fields: Any) -> GraphSpec:
        """Write the file, and say what the manifest says of it."""
        graph = helper.make_graph(
            self._nodes,
            self.name,
            [_value(spec) for spec in self.inputs],
            [_value(spec) for spec in self.outputs],
            self._constants,
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        file = f"{self.name}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), self.folder / file)
        return GraphSpec(
            name=self.name,
            role=self.role,
            file=file,
            engine=EngineSpec(kind="ort", options={"intra_op_num_threads": "1"} | (options or {})),
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            **fields,
        )


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, dtype, spec.shape)
