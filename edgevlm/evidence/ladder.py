"""The ladder: hf -> ours -> each target's graphs -> the runtime, every rung held to its gates.

Rungs are a tree; each names its parent. Witnesses are kept in the stage cache, so a compile that is
killed goes on at the rung where it stopped, and a second compile of the same thing measures nothing
again. The torch models are held one at a time, and none of them while graphs run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgevlm.cache import StageCache, digest
from edgevlm.errors import EvidenceError
from edgevlm.evidence.bisect import Divergence
from edgevlm.evidence.exam import Exam
from edgevlm.evidence.gates import Bound, parting
from edgevlm.evidence.rung import Rung, compare
from edgevlm.evidence.witness import Question, Witness, load, save
from edgevlm.progress import Progress

Answerer = Callable[[int, Question], Witness]
"""Answers a question, given with its number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Climb:
    """One ladder being climbed: what is asked, the limits, where witnesses are kept."""

    exam: Exam
    bounds: Mapping[str, Mapping[str, Bound]]
    cache: StageCache
    progress: Progress

    def over(self, exam: Exam) -> Climb:
        """The same ladder, asked by another exam."""
        return replace(self, exam=exam)

    @property
    def generates(self) -> bool:
        """Whether lossy forms give whole answers, which mean nothing where weights are drawn."""
        return self.exam.score is not None

    def witnesses(
        self, rung: str, key: str, open_answerer: Callable[[], Answerer]
    ) -> list[Witness]:
        """Return a rung's witnesses, asking only where the cache does not have them."""

        def make(folder: Path) -> None:
            answer = open_answerer()
            made = []
            with self.progress.stage(f"evidence: {rung}", len(self.exam.questions)) as advance:
                for number, question in enumerate(self.exam.questions):
                    made.append(answer(number, question))
                    advance(1)
            np.savez(folder / "witnesses.npz", **save(made))  # type: ignore[arg-type]
            del answer
            gc.collect()

        place = self.cache.build("evidence", digest(rung, key, self.exam.digest), make)
        with np.load(place / "witnesses.npz", allow_pickle=False) as arrays:
            return load(arrays)

    def root(self, witnesses: Sequence[Witness]) -> Rung:
        """The rung that all others answer to."""
        return Rung(
            name="hf", parent=None, kind="reference", accuracy=self.exam.accuracy(witnesses)
        )

    def rung(
        self,
        name: str,
        kind: str,
        parent: str,
        reference: Sequence[Witness],
        ours: Sequence[Witness],
        root: Sequence[Witness],
        *,
        complete: bool = True,
        scored: Sequence[Witness] | None = None,
        lost: Mapping[str, float] | None = None,
    ) -> Rung:
        """Measure a rung against its parent, its answers against those of `root`.

        `lost` are the figures of a parent that was rounded, against the one before it.

        `complete` says that they are whole ones: then they are scored, as those of `scored` are (of
        `root` where nothing is given), for the loss of accuracy.
        """
        return compare(
            name,
            kind=kind,
            parent=parent,
            reference=reference,
            ours=ours,
            root=root,
            bounds=parting(self.bounds[kind], lost or {}),
            accuracy=self.exam.accuracy(ours) if complete else {},
            root_accuracy=self.exam.accuracy(root if scored is None else scored)
            if complete
            else {},
        )


def demand(rung: Rung, locate: Callable[[], Divergence | None]) -> None:
    """Raise EvidenceError where a gate of the rung fails, naming the first site that diverges."""
    if not rung.failed:
        return
    gate = rung.failed[0]
    relation = "at least" if gate.is_floor else "at most"
    message = (
        f"{rung.name} is not {rung.parent}: {gate.name} is {gate.measured:.3g}, "
        f"allowed {relation} {gate.bound:.3g}"
    )
    found = locate()
    if found is None:
        raise EvidenceError(
            message,
            rung=rung.name,
            hint="no single site diverges: look at preprocessing, positions and state",
        )
    raise EvidenceError(
        f"{message}; the first diverging site is {found.site!r} (error {found.error:.2g} std)",
        rung=rung.name,
        site=found.site,
        hint=f"the last site that agrees is {found.before!r}"
        if found.before
        else "it is the first site of its graph",
    )
