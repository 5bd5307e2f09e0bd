"""Small graphs for tests: an op as a node, lowered to a target, and run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from unittest import TestCase

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from edgevlm_export.capture import SITES, capture
from edgevlm_export.lower import lower
from edgevlm_export.ops.op import DOMAIN, Op
from edgevlm_export.plan import GraphPlan
from edgevlm_export.targets import TARGETS
from edgevlm_runtime.manifest import TensorSpec

Tensors = Mapping[str, Tensor | None]
Shapes = Mapping[str, Sequence[int | str]]
NO_SHAPES: Shapes = MappingProxyType({})


def op_graph(
    op: Op,
    tensors: Tensors,
    *,
    constants: Collection[str] = (),
    dynamic: Collection[str] = (),
    shapes: Shapes = NO_SHAPES,
    **attributes: Any,
) -> ir.Model:
    """A graph of one node of ours, at the site `op`.

    `dynamic` inputs have a free second axis, and inputs with `shapes` declare those in place of
    their own.
    """
    values, inputs = [], []
    for name in op.inputs:
        tensor = tensors.get(name)
        if tensor is None:
            values.append(None)
            continue
        shape: list[int | str] = list(shapes.get(name, tensor.shape))
        if name in dynamic:
            shape[1] = "T"
        kind = ir.TensorType(ir.DataType.from_numpy(as_numpy(tensor).dtype))
        value = ir.Value(name=name, shape=ir.Shape(shape), type=kind)
        if name in constants:
            value.const_value = ir.tensor(as_numpy(tensor), name=name)
        else:
            inputs.append(value)
        values.append(value)
    outputs = eager(op, tensors, **attributes)
    attributes = {name: value for name, value in _defaults(op).items() if name in op.attributes} | (
        attributes
    )
    node = ir.node(op.name, values, attributes, domain=DOMAIN, num_outputs=len(outputs), name="op")
    for i, (value, output) in enumerate(zip(node.outputs, outputs, strict=True)):
        value.name = f"out{i}"
        value.type = ir.TensorType(ir.DataType.from_numpy(output.dtype))
        value.shape = None if dynamic or shapes else ir.Shape(output.shape)
    graph = ir.Graph(
        inputs,
        node.outputs,
        nodes=[node],
        initializers=[v for v in values if v is not None and v.name in constants],
        opset_imports={"": 18, DOMAIN: 1},
        name="graph",
    )
    return model_of(graph)


def eager(op: Op, tensors: Tensors, **attributes: Any) -> list[np.ndarray]:
    """What the torch op makes of the same."""
    names = [argument.name for argument in op.overload._schema.arguments]
    given = {**_defaults(op), **tensors, **attributes}
    outputs = op.overload(**{name: given.get(name) for name in names})
    return [as_numpy(out) for out in (outputs if isinstance(outputs, tuple) else (outputs,))]


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The same numbers; torch hands out no float8."""
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        if tensor.dtype == kind:
            name = str(kind).removeprefix("torch.")
            return tensor.view(torch.uint8).numpy().view(getattr(ml_dtypes, name))
    return tensor.numpy()


def _defaults(op: Op) -> dict[str, Any]:
    arguments = op.overload._schema.arguments
    return {a.name: a.default_value for a in arguments if a.has_default_value()}


def lowered(op: Op, target: str, tensors: Tensors, **options: Any) -> list[np.ndarray]:
    """What ONNX Runtime makes of the op lowered to a target."""
    model = lower(op_graph(op, tensors, **options), TARGETS[target])
    feeds = {value.name: as_numpy(tensors[value.name]) for value in model.graph.inputs}  # type: ignore[arg-type, index]
    engine = TARGETS[target].engine.options
    return list(run(model, feeds, engine).values())  # type: ignore[arg-type]


def spec(name: str, shape: Sequence[int | str], dtype: str = "float32") -> TensorSpec:
    """An input or output of a plan."""
    return TensorSpec(name=name, dtype=dtype, shape=tuple(shape))


def captured(
    module: nn.Module, plan: GraphPlan, target: str, *examples: Sequence[Tensor], atol: float
) -> ir.Model:
    """A module captured and lowered; for each of the examples, its graph equals it."""
    # A warning says that onnxsim lost names, and that the graph was left as it was before.
    with TestCase().assertNoLogs("edgevlm_export"):
        model = lower(capture(module, plan), TARGETS[target])
    for tensors in examples:
        with torch.no_grad():
            wanted = module(*tensors)
        feeds = {s.name: as_numpy(x) for s, x in zip(plan.inputs, tensors, strict=True)}
        outputs = list(run(model, feeds, TARGETS[target].engine.options).values())
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for out, expected in zip(outputs, wanted, strict=True):
            np.testing.assert_allclose(out, as_numpy(expected), atol=atol, rtol=0)
    return model


def model_of(graph: ir.Graph, sites: Sequence[str] = ("op",)) -> ir.Model:
    """A model of a graph made by hand, whose nodes may be named after these sites."""
    model = ir.Model(graph, ir_version=10)
    model.meta[SITES] = frozenset(sites)
    return model


def parsed(text: str, sites: Sequence[str] = ("a", "b", "c")) -> ir.Model:
    """A model in the textual syntax of ONNX; a node is named after its first output."""
    model = ir.from_onnx_text(text)
    for node in model.graph:
        node.name = node.outputs[0].name
    model.meta[SITES] = frozenset(sites)
    return model


def run(
    model: ir.Model, feeds: Mapping[str, np.ndarray], engine: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Run a graph held in memory, with the options of an engine."""
    options = ort.SessionOptions()
    for name, value in (engine or {}).items():
        options.add_session_config_entry(name, value)
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nodes(model: ir.Model) -> list[str]:
    """The nodes of a graph, one line each: name: outputs = op(inputs)."""
    lines = []
    for node in model.graph:
        outputs = ", ".join(output.name or "_" for output in node.outputs)
        inputs = ", ".join("_" if value is None else str(value.name) for value in node.inputs)
        lines.append(f"{node.name}: {outputs} = {node.op_type}({inputs})")
    return lines
