"""Graphs written by hand for the audit's tests, each site in one scheme; and lies planted in them.

Every site maps 64 numbers to 64. Weights lie in a file beside the graph, as the compiler writes
them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgevlm_export.targets.target import host_engine
from edgevlm_runtime.manifest import GraphSpec, TensorSpec

MICROSOFT = "com.microsoft"
WIDTH = 64
Array = NDArray[Any]


def graph_spec(*, emulates: bool = False, **options: str) -> GraphSpec:
    """A graph as a manifest has it, with the engine of the targets."""
    engine = host_engine("MatMulAddFusion", "NchwcTransformer", emulates=emulates)
    given = {name.replace("__", "."): value for name, value in options.items()}
    engine = type(engine)(kind=engine.kind, options={**engine.options, **given})
    x = TensorSpec(name="x", dtype="float32", shape=("M", WIDTH))
    return GraphSpec(
        name="step", role="step", file="g.onnx", engine=engine, inputs=(x,), outputs=()
    )


def feeds(rows: int = 5) -> dict[str, Array]:
    """Rows of seeded normal numbers."""
    x = np.random.default_rng(1).standard_normal((rows, WIDTH)).astype(np.float32)
    return {"x": x}


class Written:
    """A graph under way; each method adds one site behind the last."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.value = "x"
        self._rng = np.random.default_rng(0)

    def weights(self) -> Array:
        """Weights [K, N]."""
        return (self._rng.standard_normal((WIDTH, WIDTH)) / 8).astype(np.float32)

    def constant(self, name: str, value: Array | onnx.TensorProto) -> str:
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value)
        tensor.name = name
        self.constants[name] = tensor
        return name

    def node(
        self, op_type: str, inputs: list[str], name: str, domain: str = "", **attributes: Any
    ) -> str:
        self.nodes.append(
            helper.make_node(op_type, inputs, [name], name=name, domain=domain, **attributes)
        )
        self.value = name
        return name

    def floats(self, site: str) -> Written:
        """A float32 product."""
        weight = self.constant(f"{site}.weight", self.weights())
        self.node("MatMul", [self.value, weight], site)
        return self

    def nbits(self, site: str, *, bits: int = 4, block: int = 32, level: int = 0) -> Written:
        """MatMulNBits; a block of the width is a channel."""
        packed, scales = nbits_weights(self.weights(), bits, block)
        inputs = [
            self.value,
            self.constant(f"{site}.weight", packed),
            self.constant(f"{site}.scale", scales),
        ]
        sizes = {"K": WIDTH, "N": WIDTH, "bits": bits, "block_size": block}
        self.node("MatMulNBits", inputs, site, MICROSOFT, accuracy_level=level, **sizes)
        return self

    def token(self, site: str, *, most: int = 127) -> Written:
        """Int8 products of rows with a scale each."""
        x = self.value
        one, zero = (
            self.constant("one", np.float32(1)),
            self.constant("mid", np.array(128, np.uint8)),
        )
        size = self.node("Abs", [x], f"{site}/sizes")
        axis = self.constant("last", np.array([-1]))
        largest = self.node("ReduceMax", [size, axis], f"{site}/largest", keepdims=1)
        inverse = self.constant("1/127", np.float32(1 / 127))
        steps = self.node("Mul", [largest, inverse], f"{site}/steps")
        whole = self.node("Div", [x, steps], f"{site}/in_steps")
        rounded = self.node("QuantizeLinear", [whole, one, zero], f"{site}/rounded")
        weight, scale, shift = self.channels(site, most=most)
        inputs = [rounded, weight, one, scale, zero, shift]
        product = self.node("MatMulIntegerToFloat", inputs, f"{site}/product", MICROSOFT)
        self.node("Mul", [product, steps], site)
        return self

    def dynamic(self, site: str, *, most: int = 127) -> Written:
        """Int8 products with one scale for all rows of a call."""
        inputs = [self.value, *self.channels(site, most=most)]
        self.node("DynamicQuantizeMatMul", inputs, site, MICROSOFT)
        return self

    def qdq(
        self, site: str, *, activations: str = "uint8", weights: str = "int8", most: int = 0
    ) -> Written:
        """A float product between DequantizeLinear: constant scales, weights per channel."""
        rounded = self.pair(site, activations)
        weight, scale, shift = self.channels(site, weights, most or np.iinfo(weights).max)
        real = self.node("DequantizeLinear", [weight, scale, shift], f"{site}/weights", axis=1)
        self.node("MatMul", [rounded, real], site)
        return self

    def pair(self, site: str, dtype: str) -> str:
        """QuantizeLinear and DequantizeLinear with a constant scale."""
        info = np.iinfo(dtype)
        middle = (int(info.max) + int(info.min) + 1) // 2
        inputs = [
            self.constant(f"{site}.x_scale", np.float32(10 / (info.max - info.min))),
            self.constant(f"{site}.x_zero", np.array(middle, dtype)),
        ]
        rounded = self.node("QuantizeLinear", [self.value, *inputs], f"{site}/quantize")
        return self.node("DequantizeLinear", [rounded, *inputs], f"{site}/dequantize")

    def channels(self, site: str, dtype: str = "int8", most: int = 127) -> tuple[str, str, str]:
        """Weights [K, N] with a scale for each of N, and zero points of 0."""
        weights = self.weights()
        scale = (np.abs(weights).max(axis=0) / most).astype(np.float32)
        return (
            self.constant(f"{site}.weight", np.round(weights / scale).astype(dtype)),
            self.constant(f"{site}.scale", scale),
            self.constant(f"{site}.zero", np.zeros(WIDTH, dtype)),
        )

    def write(self, folder: Path, opset: int = 21) -> Path:
        """Write the graph, and its weights beside it."""
        graph = helper.make_graph(
            self.nodes,
            "step",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", WIDTH])],
            [helper.make_tensor_value_info(self.value, TensorProto.FLOAT, ["M", WIDTH])],
            list(self.constants.values()),
        )
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        path = folder / "g.onnx"
        save(model, path)
        return path


def nbits_weights(weights: Array, bits: int, block: int) -> tuple[Array, Array]:
    """Weights [K, N] as MatMulNBits has them: [N, blocks, bytes], scales [N, blocks]."""
    most = 2 ** (bits - 1) - 1
    rows = weights.T.reshape(len(weights.T), -1, block)
    scales = (np.abs(rows).max(axis=-1) / most).astype(np.float32)
    whole = (np.round(rows / scales[..., None]) + 2 ** (bits - 1)).astype(np.uint8)
    per_byte = 8 // bits
    packed = np.zeros((*whole.shape[:2], block // per_byte), np.uint8)
    for place in range(per_byte):
        packed |= whole[..., place::per_byte] << np.uint8(bits * place)
    return packed, scales


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model with its weights in a file of their own."""
    location = f"{path.stem}.weights"
    for old in (path, path.parent / location):
        old.unlink(missing_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location=location, size_threshold=256)


@contextlib.contextmanager
def edited(path: Path) -> Iterator[onnx.GraphProto]:
    """The graph in a file, to plant something in; it is written again."""
    model = onnx.load(path)
    yield model.graph
    save(model, path)


def find(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    """The node of that name."""
    return next(node for node in graph.node if node.name == name)


def replace_constants(graph: onnx.GraphProto, values: Mapping[str, Array]) -> None:
    """Give constants other values."""
    for tensor in graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
