"""What one op of ours is: a torch op, a numpy reference, and a lowering per form.

Two forms exist. `contrib` uses the fused com.microsoft ops of ONNX Runtime, `standard` only ops of
the ONNX standard with fixed shapes, which is what NPU compilers take. A target says which forms it
accepts, in order of preference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import onnx
import onnx_ir as ir
import torch

from edgevlm_export.emit import Emitter

DOMAIN = "edgevlm"
MICROSOFT = "com.microsoft"
Lowering = Callable[[Emitter, ir.Node], Sequence[ir.Value | None]]  # None: nobody reads it
P = ParamSpec("P")
R = TypeVar("R")

_SCHEMA = onnx.defs.OpSchema
_ATTRIBUTE_TYPES = {
    "float": _SCHEMA.AttrType.FLOAT,
    "int": _SCHEMA.AttrType.INT,
    "bool": _SCHEMA.AttrType.INT,
    "str": _SCHEMA.AttrType.STRING,
}
_TENSOR_TYPES = [
    f"tensor({name})"
    for name in (
        *("float", "float16", "bfloat16", "float8e4m3fn", "float8e5m2"),
        *("int8", "int16", "int32", "int64", "uint8"),
    )
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One node in a captured graph; tensors of the torch op are inputs, all else attributes."""

    name: str
    overload: torch._ops.OpOverload
    numpy: Callable[..., Any]
    lowerings: Mapping[str, Lowering]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensor arguments."""
        return tuple(a.name for a in self.overload._schema.arguments if "Tensor" in str(a.type))

    @property
    def attributes(self) -> dict[str, str]:
        """Names of the other arguments, with their types in torch's schema language."""
        arguments = self.overload._schema.arguments
        return {a.name: str(a.type) for a in arguments if "Tensor" not in str(a.type)}

    def schema(self) -> onnx.defs.OpSchema:
        """The ONNX schema of the node."""
        options = _SCHEMA.FormalParameterOption
        optional = {
            a.name: options.Optional if "Optional" in str(a.type) else options.Single
            for a in self.overload._schema.arguments
        }
        outputs = [f"out{i}" for i in range(len(self.overload._schema.returns))]
        return _SCHEMA(
            self.name,
            DOMAIN,
            1,
            inputs=[
                _SCHEMA.FormalParameter(name, f"T_{name}", param_option=optional[name])
                for name in self.inputs
            ],
            outputs=[_SCHEMA.FormalParameter(name, f"T_{name}") for name in outputs],
            type_constraints=[
                (f"T_{name}", _TENSOR_TYPES, "") for name in (*self.inputs, *outputs)
            ],
            attributes=[
                _SCHEMA.Attribute(name, _ATTRIBUTE_TYPES[kind])
                for name, kind in self.attributes.items()
            ],
        )


def torch_op(name: str, fake: Callable[..., object]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function the torch op `edgevlm::name`, which torch.export does not look into.

    The function is what runs eagerly; it returns new tensors. `fake` makes empty tensors of the
    same shapes from the same arguments, of which torch leaves out the last where they have their
    defaults.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        op = torch.library.custom_op(f"{DOMAIN}::{name}", function, mutates_args=())
        op.register_fake(fake)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            out: R = op(*args, **kwargs)
            return out

        return call

    return register


def attribute(node: ir.Node, name: str) -> Any:
    """The value of an attribute that the schema makes sure is there."""
    return node.attributes[name].value


def tensors(node: ir.Node, count: int) -> tuple[ir.Value | None, ...]:
    """The first inputs of a node, None for those left out at the end."""
    return tuple((*node.inputs, *[None] * count)[:count])


def dims(value: ir.Value | None) -> tuple[int | str, ...]:
    """The shape of a value, names for dynamic dimensions."""
    assert value is not None
    assert value.shape is not None
    return tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)


def last_dim(value: ir.Value | None) -> int:
    """The last dimension of a value, which is a number."""
    size = dims(value)[-1]
    assert isinstance(size, int), f"{value} has a dynamic last dimension"
    return size


def static_dims(value: ir.Value | None) -> tuple[int, ...]:
    """The shape of a value whose dimensions are all numbers."""
    shape = dims(value)
    numbers = tuple(d for d in shape if isinstance(d, int))
    assert len(numbers) == len(shape), f"{value} has a dynamic dimension"
    return numbers
