"""How torch ops become nodes, where the exporter's own way is not the one we want.

Ops of ours become one node each, in our domain. A few plain ones are written here because the
exporter's translations serve cases we never have, at the price of casts, reshapes or sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnxscript import opset18
from onnxscript.values import Opset

from edgevlm_export.ops.op import DOMAIN, Op
from edgevlm_export.ops.table import OPS

Translation = Callable[..., Any]
_aten = torch.ops.aten


def translation_table() -> dict[Callable[..., Any], Translation]:
    """Translations by torch op, as `torch.onnx.export` takes them."""
    plain: dict[Callable[..., Any], Translation] = {
        _aten.arange.default: lambda end, **more: _arange(0, end, **more),
        _aten.arange.start: _arange,
        _aten.arange.start_step: _arange,
        _aten.conv2d.default: _conv2d,
        _aten.full.default: _full,
        _aten.index_select.default: _index_select,
        _aten.slice.Tensor: _slice,
        _aten.split_with_sizes.default: _split_with_sizes,
    }
    return plain | {op.overload: _own(op) for op in OPS.values()}


def _own(op: Op) -> Translation:
    """The function that turns a call of an op of ours into its node."""
    if not onnx.defs.has(op.name, DOMAIN):
        onnx.defs.register_schema(op.schema())
    opset = Opset(DOMAIN, 1)
    arguments = op.overload._schema.arguments

    def translate(*values: Any, **named: Any) -> Any:
        bound = {a.name: a.default_value for a in arguments if a.has_default_value()}
        bound |= dict(zip((a.name for a in arguments), values, strict=False)) | named
        tensors = [bound[name] for name in op.inputs]
        return getattr(opset, op.name)(*tensors, **{name: bound[name] for name in op.attributes})

    return translate


def _conv2d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Any:
    return opset18.Conv(
        x,
        weight,
        bias,
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
        kernel_shape=list(weight.shape[2:]),
    )


def _arange(start: Any, end: Any, step: Any = 1, **_: object) -> Any:
    """Whole numbers, a constant where their end is known."""
    if all(isinstance(bound, int) for bound in (start, end, step)):
        return _ints(*range(start, end, step))
    start, end, step = (
        opset18.Constant(value_int=bound) if isinstance(bound, int) else bound
        for bound in (start, end, step)
    )
    return opset18.Range(start, end, step)


def _full(size: Sequence[int], value: float, **_: object) -> Any:
    """A float32 constant of one value."""
    constant: Any = opset18.Constant(value_float=float(value))
    return opset18.Expand(constant, _ints(*size))


def _index_select(x: Any, dim: int, index: Any) -> Any:
    return opset18.Gather(x, index, axis=dim)


def _slice(
    x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    start, end = start or 0, torch.iinfo(torch.int64).max if end is None else end
    if (start, end, step) == (0, torch.iinfo(torch.int64).max, 1):
        return opset18.Identity(x)
    return opset18.Slice(x, *(_ints(n) for n in (start, end, dim, step)))


def _split_with_sizes(x: Any, sizes: Sequence[int], dim: int = 0) -> Any:
    if len(sizes) == 1:
        return [opset18.Identity(x)]
    # The exporter asks for the number of parts, which a Split with sizes must not state: capture
    # removes it again.
    return opset18.Split(x, _ints(*sizes), axis=dim, num_outputs=len(sizes))


def _ints(*values: int) -> Any:
    return opset18.Constant(value_ints=list(values))
