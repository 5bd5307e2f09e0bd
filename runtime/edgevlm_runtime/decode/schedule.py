"""Which calls consume some rows: the graph of each, its share of the rows, and the slots they take.

A call takes the graph of its phase that pads least; more rows than any graph takes are cut into
chunks. A phase that no graph serves is served by the graphs of `decode`. A prompt with pictures
goes whole to a graph of the phase `picture`, where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgevlm_runtime.consistency import PHASES, PICTURE
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
        self._serving = {
            phase: serving.get(phase, serving["decode"]) for phase in PHASES if phase != PICTURE
        }
        self._of_pictures = serving.get(PICTURE, [])
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

    def prompt(self, num_rows: int, num_pictures: int) -> Calls:
        """The calls for a prompt; one call where it has pictures and there are graphs for them.

        Raises InputError where no such graph takes as many rows and pictures, and as `calls` does.
        """
        if not num_pictures or not self._of_pictures:
            return self.calls("prefill", num_rows, every=False)
        fitting = [step for step in self._of_pictures if step.takes(num_rows, num_pictures)]
        if not fitting:
            taken = ", ".join(_taken(step) for step in self._of_pictures)
            raise InputError(
                f"prompt has {num_rows} tokens with {num_pictures} pictures or tiles, the bundle "
                f"takes {taken}",
                hint="shorten the prompt, or compile for more rows or pictures",
            )
        step = _padding_least(fitting, num_rows)
        return self._planned("prompt", num_rows, ((step, num_rows),), num_pictures)

    def ordinary(self, num_rows: int) -> list[StepGraph]:
        """The graphs that most answers need: for a prompt of so many rows, for a token after it.

        Of the graphs for prompts with pictures, it is one of those for the fewest.
        """
        steps = [
            _padding_least(self._serving[phase], rows)
            for phase, rows in (("prefill", num_rows), ("decode", 1))
        ]
        if self._of_pictures:
            fewest = min(map(_num_pictures, self._of_pictures))
            serving = [step for step in self._of_pictures if _num_pictures(step) == fewest]
            steps.append(_padding_least(serving, num_rows))
        return steps

    def _worked_out(self, phase: str, num_rows: int, every: bool) -> Calls:
        what = "prompt" if phase == "prefill" else "call"
        if num_rows == 0:
            raise InputError(f"{what} has no tokens", hint="give at least one")
        return self._planned(what, num_rows, tuple(self._chunks(phase, num_rows, every)), 0)

    def _planned(
        self, what: str, num_rows: int, chunks: tuple[tuple[StepGraph, int], ...], num_pictures: int
    ) -> Calls:
        """These chunks, where each leaves rows, with the slots that they take."""
        for step, size in chunks:
            dropped = max([step.dropped(name, num_pictures) for name in step.graph.dropped] + [0])
            if dropped >= size:
                raise InputError(
                    f"graph {step.graph.name!r} drops {dropped} of the rows of every call, "
                    f"got a piece of {size}",
                    hint="lengthen the prompt, or compile with another size of pieces",
                )
        slots = tuple(_slots(group, chunks, num_pictures) for group in self._limited)
        return Calls(what=what, num_rows=num_rows, chunks=chunks, slots=slots)

    def _chunks(self, phase: str, num_rows: int, every: bool) -> Iterator[tuple[StepGraph, int]]:
        while num_rows:
            step = _padding_least(self._serving[phase], num_rows)
            most = step.max_verify_rows if every else step.max_rows
            size = num_rows if most is None else min(num_rows, most)
            yield step, size
            num_rows -= size


def _padding_least(serving: Sequence[StepGraph], num_rows: int) -> StepGraph:
    """The graph that pads least, else the one that takes the most rows."""
    fitting = [step for step in serving if step.max_rows is None or step.max_rows >= num_rows]
    if fitting:
        return min(fitting, key=lambda step: step.graph.rows or num_rows)
    return max(serving, key=lambda step: step.max_rows or 0)


def _num_pictures(step: StepGraph) -> int:
    """The picture groups of a call, 0 where there may be any number of them."""
    return step.pictures if isinstance(step.pictures, int) else 0


def _taken(step: StepGraph) -> str:
    """What a graph takes, in words."""
    rows = "any number" if step.max_rows is None else f"up to {step.max_rows}"
    return f"{rows} with {_num_pictures(step) or 'any number'}"


def _slots(group: Group, chunks: Sequence[tuple[StepGraph, int]], num_pictures: int) -> int:
    """The free slots of a group that these calls need."""
    needed = sum(size - step.dropped(group.name, num_pictures) for step, size in chunks)
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
