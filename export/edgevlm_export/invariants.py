"""What a graph may hold on its way to a target, and what it must keep: rules, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgevlm_export.capture import SITES
from edgevlm_export.emit import PLUMBING
from edgevlm_export.errors import ExportError
from edgevlm_export.ops.op import DOMAIN
from edgevlm_export.rewrites.lower_ops import LowerOps
from edgevlm_export.taps import tapped_sites
from edgevlm_export.targets.target import Target

_SMALL_BYTES = 1 << 16  # larger constants are looked at once, while they are written


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A graph on its way from `captured` to `target`, after the rewrites `done`."""

    model: ir.Model
    captured: ir.Model
    target: Target
    done: Sequence[ir.passes.PassBase]

    @property
    def is_lowered(self) -> bool:
        """Whether ops of ours are gone."""
        return any(isinstance(rewrite, LowerOps) for rewrite in self.done)


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """What is wrong, where, and what to do about it."""

    place: str
    op: str
    clause: str
    hint: str


Rule = Callable[[Stage], Iterator[Violation]]


def check(stage: Stage) -> None:
    """Raise ExportError for the first rule that the graph breaks."""
    for rule in RULES:
        for found in rule(stage):
            after = f" after {type(stage.done[-1]).__name__}" if stage.done else ""
            raise ExportError(
                f"{found.place!r} {found.clause}{after}",
                role=stage.model.graph.name or "graph",
                op=found.op,
                hint=found.hint,
            )


def _ops(stage: Stage) -> Iterator[Violation]:
    target = stage.target
    for node in stage.model.graph:
        if node.domain == DOMAIN and not stage.is_lowered:
            continue
        if node.op_type not in target.ops.get(node.domain, frozenset()):
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            yield Violation(
                place=str(node.name),
                op=node.op_type,
                clause=f"is {name}, which the target {target.name!r} does not take",
                hint=f"lower it to other ops, or add it to the ops of {target.name!r}",
            )


def _names(stage: Stage) -> Iterator[Violation]:
    sites = {*stage.model.meta[SITES], PLUMBING}
    seen: set[str] = set()
    for node in stage.model.graph:
        name = node.name or ""
        site = name.partition("/")[0]
        clause = ""
        if name in seen:
            clause = "is the name of two nodes"
        elif site not in sites:
            clause = f"does not begin with a site of the model or with {PLUMBING!r}"
        seen.add(name)
        if clause:
            hint = "name new nodes site/part, with an Emitter"
            yield Violation(place=name, op=node.op_type, clause=clause, hint=hint)


def _sites(stage: Stage) -> Iterator[Violation]:
    left = set(tapped_sites(stage.model))
    for site in tapped_sites(stage.captured):
        if site not in left:
            hint = "keep the name of the value, or record a tap that computes it again"
            clause = "is a site whose output is lost"
            yield Violation(place=site, op="site", clause=clause, hint=hint)


def _interface(stage: Stage) -> Iterator[Violation]:
    for kind in ("inputs", "outputs"):
        before, after = (_signature(getattr(m.graph, kind)) for m in (stage.captured, stage.model))
        if before != after:
            clause = f"had the {kind} {', '.join(before)}, and has {', '.join(after)}"
            hint = "a rewrite leaves what the host feeds and reads as it is"
            yield Violation(place=str(stage.model.graph.name), op="graph", clause=clause, hint=hint)


def _signature(values: Sequence[ir.Value]) -> list[str]:
    """Names, dtypes and shapes."""
    return [f"{value.name} {value.dtype} {value.shape}" for value in values]


def _dtypes(stage: Stage) -> Iterator[Violation]:
    if not stage.is_lowered:
        return
    target = stage.target
    allowed = ", ".join(sorted(dtype.name.lower() for dtype in target.dtypes))
    for value, op in _values(stage.model.graph):
        if value.dtype is not None and value.dtype not in target.dtypes:
            clause = f"is {value.dtype.name.lower()}, the target {target.name!r} has {allowed}"
            hint = "cast it in the model, or choose a target that has the type"
            yield Violation(place=str(value.name), op=op, clause=clause, hint=hint)


def _static_shapes(stage: Stage) -> Iterator[Violation]:
    target = stage.target
    if not target.static_shapes or not stage.is_lowered:
        return
    for value, op in _values(stage.model.graph):
        shape = value.shape
        if shape is None or not all(isinstance(size, int) for size in shape):
            known = "unknown" if shape is None else f"[{', '.join(str(size) for size in shape)}]"
            clause = f"has the shape {known}, the target {target.name!r} takes fixed shapes only"
            hint = "give the plan numbers for its dynamic dimensions: plan.fixed(N=1)"
            yield Violation(place=str(value.name), op=op, clause=clause, hint=hint)


def _finite_constants(stage: Stage) -> Iterator[Violation]:
    for name, value in stage.model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes > _SMALL_BYTES or not tensor.dtype.is_floating_point():
            continue
        if not np.isfinite(tensor.numpy()).all():
            clause = "is a constant with NaN or infinity in it"
            hint = "use a large finite number where a mask closes"
            yield Violation(place=name, op="Constant", clause=clause, hint=hint)


RULES: tuple[Rule, ...] = (
    _ops,
    _names,
    _sites,
    _interface,
    _dtypes,
    _static_shapes,
    _finite_constants,
)


def _values(graph: ir.Graph) -> Iterator[tuple[ir.Value, str]]:
    """Every value with the op that makes it."""
    for value in (*graph.inputs, *graph.initializers.values()):
        yield value, "Input" if value.const_value is None else "Constant"
    for node in graph:
        for output in node.outputs:
            if output.name:
                yield output, node.op_type
