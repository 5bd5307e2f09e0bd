"""What a target is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from edgevlm_export.forms import Form
from edgevlm_runtime.manifest import EngineSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where graphs run: the form they are captured in, and what happens to them after.

    `ops` are the op types a finished graph may hold, by domain; `rewrites` run in order, each
    checked against the rest of this object.
    """

    name: str
    form: Form
    ops: Mapping[str, frozenset[str]]
    dtypes: frozenset[ir.DataType]
    static_shapes: bool
    rewrites: tuple[ir.passes.PassBase, ...]
    engine: EngineSpec


def host_engine(*optimizers: str, emulates: bool = False) -> EngineSpec:
    """ONNX Runtime on the CPU, without those of its optimizers that lose the names of nodes.

    A session that has run stops spinning, so that it does not slow the next graph's. One that
    `emulates` computes QuantizeLinear and DequantizeLinear as they stand: fused, weights alone
    would silently get rounded activations too, and float8 no kernel.
    """
    options = {
        "optimization.disable_specified_optimizers": ";".join(optimizers),
        "session.force_spinning_stop": "1",
    }
    if emulates:
        options["session.disable_quant_qdq"] = "1"
    return EngineSpec(kind="ort", options=options)


def dtype_set(names: str) -> frozenset[ir.DataType]:
    """The types named in a line of words."""
    return frozenset(ir.DataType[name] for name in names.split())


def op_names(*lines: str) -> frozenset[str]:
    """The op types named in lines of words."""
    return frozenset(name for line in lines for name in line.split())
