"""Which calls consume some rows: the graph of each, its share of the rows, and the slots they take.

A call takes the graph of its phase that pads least; more rows than any graph takes are cut into
chunks. A phase that no graph serves is served by the graphs of `decode`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgevlm_runtime.consistency import PHASES
from edgevlm_runtime.decode.groups import Group
from edgevlm_runtime.decode.step_graph import KEPT_ROWS, StepGraph
from edgevlm_runtime.errors import BundleError, InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Calls:
    """The calls that consume `num_rows` rows: each a graph and how many of the rows it consumes.

    `slots` says how many free slots each group whose slots run out must have; `what` names the rows
    in messages.
    """

    what: str
    num_rows: int
    chunks: tuple[tuple[StepGraph, int], ...]
    slots: tuple[int, ...]


class Schedule:
    """The step graphs of a role, by phase.

    Every token asks, so what was answered for a few rows is kept; every prompt has another length.
    """

    def __init__(self, steps: Sequence[StepGraph], groups: Sequence[Group]) -> None:
        """Sort the graphs by phase."""
        phases = {phase for step in steps for phase in step.graph.phases}
        if "decode" not in phases:
            raise BundleError(
                f"no graph of role {steps[0].graph.role!r} serves the phase 'decode'",
                hint="compile the bundle again",
            )
        self._limited = [group for group in groups if group.limited]
        serving = {
            phase: [step for step in steps if phase in step.graph.phases]
            for phase in sorted(phases)
        }
        for phase in serving:
            _check_extras(phase, serving[phase])
        self._serving = {phase: serving.get(phase, serving["decode"]) for phase in PHASES}
        self._known: dict[tuple[str, int, bool], Calls] = {}

    def calls(self, phase: str, num_rows: int, *, every: bool) -> Calls:
        """The calls for these rows; `every` where logits of all of them are wanted.

        Raises InputError where there are no rows, or where a graph drops all the rows of a call.
        """
        key = (phase, num_rows, every)
        calls = self._known.get(key)
        if calls is None:
            calls = self._worked_out(phase, num_rows, every)
            if num_rows <= KEPT_ROWS:
                self._known[key] = calls
        return calls

    def graph(self, phase: str, num_rows: int) -> StepGraph:
        """The graph of the phase that pads least, else the one that takes the most rows."""
        serving = self._serving[phase]
        fitting = [step for step in serving if step.max_rows is None or step.max_rows >= num_rows]
        if fitting:
            return min(fitting, key=lambda step: step.graph.rows or num_rows)
        return max(serving, key=lambda step: step.max_rows or 0)

    def _worked_out(self, phase: str, num_rows: int, every: bool) -> Calls:
        what = "prompt" if phase == "prefill" else "call"
        if num_rows == 0:
            raise InputError(f"{what} has no tokens", hint="give at least one")
        chunks = tuple(self._chunks(phase, num_rows, every))
        for step, size in chunks:
            dropped = max(step.graph.dropped.values(), default=0)
            if dropped >= size:
                raise InputError(
                    f"graph {step.graph.name!r} drops {dropped} of the rows of every call, "
                    f"got a piece of {size}",
                    hint="lengthen the prompt, or compile with another size of pieces",
                )
        slots = tuple(_slots(group, chunks) for group in self._limited)
        return Calls(what=what, num_rows=num_rows, chunks=chunks, slots=slots)

    def _chunks(self, phase: str, num_rows: int, every: bool) -> Iterator[tuple[StepGraph, int]]:
        while num_rows:
            step = self.graph(phase, num_rows)
            most = step.max_verify_rows if every else step.max_rows
            size = num_rows if most is None else min(num_rows, most)
            yield step, size
            num_rows -= size


def _slots(group: Group, chunks: Sequence[tuple[StepGraph, int]]) -> int:
    """The free slots of a group that these calls need."""
    needed = sum(size - step.graph.dropped.get(group.name, 0) for step, size in chunks)
    if group.inplace:  # such a graph writes its rows of padding, too
        step, size = chunks[-1]
        needed += (step.graph.rows or size) - size
    return needed


def _check_extras(phase: str, serving: Sequence[StepGraph]) -> None:
    """Graphs that may share the rows of one call give the same extras, so that they can be joined.

    They must also agree on which of them have an entry per row.
    """
    first = serving[0]
    for step in serving[1:]:
        if step.extras != first.extras:
            raise BundleError(
                f"step graphs {first.graph.name!r} and {step.graph.name!r} both serve the phase "
                f"{phase!r}, and give other extras: {_listed(first)}; {_listed(step)}",
                hint="compile the bundle again, with the same outputs for all graphs of a phase",
            )


def _listed(step: StepGraph) -> str:
    return (
        ", ".join(
            f"{name!r} per row" if per_row else repr(name)
            for name, per_row in sorted(step.extras.items())
        )
        or "none"
    )
