"""What a graph may hold: planted violations are errors that name op and site."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from edgevlm_export.errors import ExportError
from edgevlm_export.forms import FORMS
from edgevlm_export.invariants import Stage, check
from edgevlm_export.rewrites.fuse_bias import FuseBias
from edgevlm_export.rewrites.lower_ops import LowerOps
from edgevlm_export.taps import record_tap
from edgevlm_export.targets import TARGETS
from tests.export.running import parsed

LOWERED = (LowerOps(("standard",)),)


def graph(body: str = "a = Relu(x) b = Neg(a) c = Add(b, small)") -> ir.Model:
    model = parsed(f"""<ir_version: 10, opset_import: ["" : 19, "com.microsoft" : 1]>
        g (float[2,16] x) => (float[2,16] c) <float[1] small = {{1}}> {{ {body} }}""")
    for node in model.graph:
        node.outputs[0].shape = ir.Shape([2, 16])
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return model


def stage(
    model: ir.Model,
    target: str,
    done: tuple[ir.passes.PassBase, ...] = LOWERED,
    captured: ir.Model | None = None,
) -> Stage:
    return Stage(model=model, captured=captured or model, target=TARGETS[target], done=done)


def violation(
    model: ir.Model,
    target: str,
    done: tuple[ir.passes.PassBase, ...] = LOWERED,
    captured: ir.Model | None = None,
) -> str:
    with pytest.raises(ExportError) as caught:
        check(stage(model, target, done, captured))
    return str(caught.value)


def test_a_clean_graph_passes() -> None:
    model = graph("a = Relu(x) c = Add(a, small)")
    for target in TARGETS:
        check(stage(model, target))


def test_foreign_op() -> None:
    assert violation(graph("a = Relu(x) b = Celu(a) c = Add(b, small)"), "static") == (
        "g: 'b' is Celu, which the target 'static' does not take after LowerOps\n"
        "  hint: lower it to other ops, or add it to the ops of 'static'"
    )


def test_contrib_op_on_the_static_target() -> None:
    model = graph("a = Relu(x) b = com.microsoft.FastGelu(a) c = Add(b, small)")
    check(stage(model, "ort"))
    assert violation(model, "static", (*LOWERED, FuseBias())) == (
        "g: 'b' is com.microsoft::FastGelu, which the target 'static' does not take "
        "after FuseBias\n"
        "  hint: lower it to other ops, or add it to the ops of 'static'"
    )


def test_an_op_of_ours_may_stay_until_lowering() -> None:
    model = graph("a = Relu(x) c = Add(a, small)")
    next(iter(model.graph)).domain = "edgevlm"
    check(stage(model, "ort", ()))
    assert violation(model, "ort") == (
        "g: 'a' is edgevlm::Relu, which the target 'ort' does not take after LowerOps\n"
        "  hint: lower it to other ops, or add it to the ops of 'ort'"
    )


def rename(model: ir.Model, name: str) -> None:
    next(iter(model.graph)).name = name


@pytest.mark.parametrize(
    ("name", "clause"),
    [
        ("node_7", "'node_7' does not begin with a site of the model or with 'plumbing'"),
        ("", "'' does not begin with a site of the model or with 'plumbing'"),
        ("c", "'c' is the name of two nodes"),
    ],
)
def test_names(name: str, clause: str) -> None:
    model = graph("a = Relu(x) c = Add(a, small)")
    rename(model, name)
    hint = "name new nodes site/part, with an Emitter"
    assert violation(model, "ort") == f"g: {clause} after LowerOps\n  hint: {hint}"


@pytest.mark.parametrize("name", ["a/relu", "plumbing/relu"])
def test_parts_and_plumbing_are_names(name: str) -> None:
    model = graph("a = Relu(x) c = Add(a, small)")
    rename(model, name)
    check(stage(model, "ort"))


def test_a_site_must_keep_its_output() -> None:
    captured = graph("a = Relu(x) b = Add(a, small) c = Add(b, small)")
    model = graph("a = Relu(x) c = Add(a, small)")
    assert violation(model, "ort", captured=captured) == (
        "g: 'b' is a site whose output is lost after LowerOps\n"
        "  hint: keep the name of the value, or record a tap that computes it again"
    )
    record_tap(model, "c", ["a"])
    next(n for n in model.graph if n.name == "a").name = "b/relu"
    record_tap(model, "b", ["a"], "small")
    check(stage(model, "ort", captured=captured))


def test_inputs_and_outputs_stay() -> None:
    captured, model = (graph("a = Relu(x) c = Add(a, small)") for _ in range(2))
    model.graph.inputs[0].shape = ir.Shape(["N", 16])
    assert violation(model, "ort", captured=captured) == (
        "g: 'g' had the inputs x FLOAT [2,16], and has x FLOAT [N,16] after LowerOps\n"
        "  hint: a rewrite leaves what the host feeds and reads as it is"
    )


def set_dtype(value: ir.Value) -> None:
    value.type = ir.TensorType(ir.DataType.DOUBLE)


def set_dynamic(value: ir.Value) -> None:
    value.shape = ir.Shape(["T", 16])


def set_unknown(value: ir.Value) -> None:
    value.shape = None


@pytest.mark.parametrize(
    ("change", "clause", "hint"),
    [
        (
            set_dtype,
            "is double, the target 'static' has bool, float, float8e4m3fn, float8e5m2, int16, "
            "int4, int64, int8",
            "cast it in the model, or choose a target that has the type",
        ),
        (
            set_dynamic,
            "has the shape [T, 16], the target 'static' takes fixed shapes only",
            "give the plan numbers for its dynamic dimensions: plan.fixed(N=1)",
        ),
        (
            set_unknown,
            "has the shape unknown, the target 'static' takes fixed shapes only",
            "give the plan numbers for its dynamic dimensions: plan.fixed(N=1)",
        ),
    ],
)
def test_values(change: Callable[[ir.Value], None], clause: str, hint: str) -> None:
    model = graph("a = Relu(x) c = Add(a, small)")
    change(next(iter(model.graph)).outputs[0])
    assert violation(model, "static") == f"g: 'a' {clause} after LowerOps\n  hint: {hint}"


def test_dynamic_shapes_are_for_other_targets() -> None:
    model = graph("a = Relu(x) c = Add(a, small)")
    set_dynamic(next(iter(model.graph)).outputs[0])
    check(stage(model, "ort"))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_constants_are_finite(number: float) -> None:
    model = graph("a = Relu(x) c = Add(a, small)")
    value = model.graph.initializers["small"]
    value.const_value = ir.tensor(np.array([number], dtype=np.float32), name="small")
    assert violation(model, "ort") == (
        "g: 'small' is a constant with NaN or infinity in it after LowerOps\n"
        "  hint: use a large finite number where a mask closes"
    )


@pytest.mark.parametrize("op", ["If", "Loop", "Scan"])
def test_no_target_takes_control_flow(op: str) -> None:
    assert all(op not in ops for target in TARGETS.values() for ops in target.ops.values())


def test_plans_know_every_target() -> None:
    assert {name: target.form for name, target in TARGETS.items()} == dict(FORMS)
