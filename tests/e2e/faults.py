"""Faults planted in written graphs: each takes a file and makes one site of it wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference


def swap_weight(path: Path, site: str, other: str) -> None:
    """Let a matrix product use the matrix of another site of the same shape."""
    model = onnx.load(path, load_external_data=False)
    node, donor = _maker(model, site), _maker(model, other)
    node.input[1] = donor.input[1]
    _save(model, path)


def widen_epsilon(path: Path, site: str) -> None:
    """Put an epsilon of 1 into a norm, as an attribute or as a constant."""
    model = onnx.load(path, load_external_data=False)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.name.split("/")[0] != site:
            continue
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 1.0
                return _save(model, path)
        if node.op_type == "Add":
            for index, name in enumerate(node.input):
                tensor = constants.get(name)
                if tensor is not None:
                    value = np.ones_like(numpy_helper.to_array(tensor))
                    model.graph.initializer.append(numpy_helper.from_array(value, f"{name}.wide"))
                    node.input[index] = f"{name}.wide"
                    return _save(model, path)
    raise AssertionError(f"no epsilon at {site}")


def shift_rotation(path: Path, site: str) -> None:
    """Turn the rows of one layer by the angles of the row before."""
    model = shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    nodes = [node for node in model.graph.node if node.name.split("/")[0] == site]
    shifted: dict[str, str] = {}
    for node in nodes:
        for index, name in enumerate(node.input):
            if _is_table(model, name):
                if name not in shifted:
                    shifted[name] = _shift(model, name, site)
                node.input[index] = shifted[name]
    assert shifted, f"no rotary tables at {site}"
    _save(model, path)


def _is_table(model: onnx.ModelProto, name: str) -> bool:
    """Whether a value is a rotary table, or one of its reshapes."""
    makers = {output: node for node in model.graph.node for output in node.output}
    while name in makers and makers[name].op_type in ("Unsqueeze", "Reshape", "Concat", "Cast"):
        name = makers[name].input[0]
    return name.startswith(("rope_cos", "rope_sin"))


def _shift(model: onnx.ModelProto, name: str, site: str) -> str:
    """A roll of the rows by one, before the first node that reads it: the last row comes first."""
    makers = {output: node for node in model.graph.node for output in node.output}
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.value_info)
    }
    rank_axis = 0
    if name in makers:
        rank_axis = next(axis for axis, size in enumerate(shapes[name]) if size > 1)
    rows = shapes[name][rank_axis]
    order = np.roll(np.arange(rows), 1).astype(np.int64)
    indices, out = f"{name}.{site}.order", f"{name}.{site}.rolled"
    model.graph.initializer.append(numpy_helper.from_array(order, indices))
    roll = helper.make_node(
        "Gather", [name, indices], [out], name=f"plumbing/roll/{out}", axis=rank_axis
    )
    place = 0
    if name in makers:
        place = 1 + next(i for i, node in enumerate(model.graph.node) if name in node.output)
    model.graph.node.insert(place, roll)
    return out


def _maker(model: onnx.ModelProto, site: str) -> onnx.NodeProto:
    """The matrix product of a site."""
    return next(
        node
        for node in model.graph.node
        if node.name.split("/")[0] == site and node.op_type in ("MatMul", "Gemm", "Conv")
    )


def _save(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString())
