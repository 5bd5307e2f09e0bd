"""Emits the nodes that take the place of one node, named after its site."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

PLUMBING = "plumbing"
_LISTED = 8  # constants of more numbers are named after a hash


class Emitter:
    """Collects new nodes for `node`; each is named `site/part`, and so is its first output.

    Constants and values that many sites share (`plumbing/...`) exist once in the graph.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        """Emit in front of `node` in `graph`."""
        assert node.name is not None
        self.graph = graph
        self.site = node.name
        self.nodes: list[ir.Node] = []
        self._node = node
        self._parts: dict[str, int] = {}

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        num_outputs: int = 1,
        part: str | None = None,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Add a node; `part` defaults to the op's name, numbered where it repeats."""
        part = part or op_type.lower()
        count = self._parts[part] = self._parts.get(part, -1) + 1
        name = f"{self.site}/{part}{count or ''}"
        inputs = list(inputs)
        while inputs and inputs[-1] is None:
            inputs.pop()
        node = ir.node(
            op_type, inputs, attributes, domain=domain, num_outputs=num_outputs, name=name
        )
        for i, output in enumerate(node.outputs):
            output.name = f"{name}:{i}" if i else name
        self.graph.insert_before(self._node, node)
        self.nodes.append(node)
        return tuple(node.outputs)

    def one(self, op_type: str, *inputs: ir.Value | None, **options: Any) -> ir.Value:
        """Add a node with one output."""
        return self.node(op_type, inputs, **options)[0]

    def constant(self, value: np.ndarray) -> ir.Value:
        """The initializer of this value, shared by all who ask for an equal one."""
        name = constant_name(value)
        return self.initializer(name, lambda: ir.tensor(value, name=name))

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector, for shapes and axes."""
        return self.constant(np.array(values, dtype=np.int64))

    def scalar(self, value: float, like: ir.Value) -> ir.Value:
        """A number of the dtype of `like`."""
        assert like.dtype is not None
        return self.constant(np.array(value, dtype=like.dtype.numpy()))

    def initializer(self, name: str, make: Callable[[], ir.TensorProtocol]) -> ir.Value:
        """The initializer of that name, made at the first call."""
        value = self.graph.initializers.get(name)
        if value is None:
            tensor = make()
            value = ir.Value(
                name=name,
                const_value=tensor,
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
            )
            self.graph.register_initializer(value)
        return value

    def shared(self, name: str, make: Callable[[Emitter], ir.Value]) -> ir.Value:
        """The value `plumbing/name`, computed by the nodes that the first call emits."""
        site = f"{PLUMBING}/{name}"
        for node in self.graph:
            if node is self._node:
                break
            for output in node.outputs:
                if output.name == site:
                    return output
        emitter = Emitter(self.graph, self._node)
        emitter.site = site
        value = make(emitter)
        value.name = site
        return value


def constant_name(value: np.ndarray) -> str:
    """A name that says what the constant is: equal names, equal bytes."""
    shape = "x".join(str(size) for size in value.shape)
    if value.size <= _LISTED:
        content = ",".join(repr(x) for x in value.ravel().tolist())
    else:
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
    return f"{PLUMBING}/{value.dtype.name}[{shape}]({content})"
