"""Gathers the evidence of one compile: climbs the ladder rung by rung, and stops at a failing gate.

The order is chosen for memory: the reference first, then our model, each dropped before the next,
then the graphs of one variant at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevlm.checkpoint import Checkpoint
from edgevlm.evidence.bisect import Divergence
from edgevlm.evidence.eager import eager_witness
from edgevlm.evidence.fault import find_fault
from edgevlm.evidence.graph import GraphWitness
from edgevlm.evidence.ladder import Answerer, Climb, demand
from edgevlm.evidence.origin import find_origin
from edgevlm.evidence.referee import Referee
from edgevlm.evidence.rung import Rung
from edgevlm.evidence.runtime import RuntimeWitness
from edgevlm.evidence.witness import Question, Witness
from edgevlm.graphs import graph_file, module_of
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.plan import Plan, VariantPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is measured: a checkpoint, the model after its passes, and the graphs made of it.

    `spec` is the model's before any pass; `folder` holds a whole bundle. The keys name what the
    witnesses of a stage depend on.
    """

    checkpoint: Checkpoint
    checkpoint_key: str
    spec: VlmSpec
    model: Callable[[], Vlm]
    model_key: str
    plan: Plan
    folder: Path
    graphs_key: str


def gather(subject: Subject, climb: Climb) -> tuple[Rung, ...]:
    """Climb the ladder of a compile; raise EvidenceError at the first rung whose gates fail."""
    root = reference_witnesses(subject, climb)
    rungs = [climb.root(root)]
    ours = eager_witnesses(subject, climb, root)
    rungs.append(climb.rung("ours", "model", "hf", root, ours, root))
    demand(
        rungs[-1], lambda: find_origin(subject.checkpoint, subject.spec, climb.exam.questions[0])
    )
    for variant in subject.plan.variants:
        rungs += _variant_rungs(subject, climb, variant, root, ours)
    return tuple(rungs)


def reference_witnesses(subject: Subject, climb: Climb) -> list[Witness]:
    """What the Hugging Face model answers."""
    return climb.witnesses("hf", subject.checkpoint_key, lambda: _referee(subject, climb))


def eager_witnesses(subject: Subject, climb: Climb, root: Sequence[Witness]) -> list[Witness]:
    """What our model answers after its passes."""
    return climb.witnesses("ours", subject.model_key, lambda: _eager(subject, climb, root))


def _variant_rungs(
    subject: Subject,
    climb: Climb,
    variant: VariantPlan,
    root: Sequence[Witness],
    ours: Sequence[Witness],
) -> list[Rung]:
    name = variant.target
    key = f"{name} {subject.graphs_key}"
    graphs = climb.witnesses(name, key, lambda: _graphs(subject, name, ours))
    rung = climb.rung(name, "graph", "ours", ours, graphs, root, complete=False)
    demand(rung, lambda: locate(subject, variant))
    answers = climb.witnesses(
        f"{name}/runtime",
        key,
        lambda: RuntimeWitness(subject.folder, name, climb.exam).answer,
    )
    top = climb.rung(f"{name}/runtime", "runtime", name, graphs, answers, root)
    demand(top, lambda: locate(subject, variant))
    return [rung, top]


def locate(subject: Subject, variant: VariantPlan) -> Divergence | None:
    """Bisect the graphs of a variant in the order in which they run."""
    model = subject.model()
    for planned in variant.graphs:
        made = module_of(model, variant, planned)
        found = find_fault(made, subject.folder / graph_file(variant, planned))
        if found is not None:
            return found
    return None


def _referee(subject: Subject, climb: Climb) -> Answerer:
    referee = Referee(subject.checkpoint, subject.spec)

    def answer(number: int, question: Question) -> Witness:
        return referee.answer(question, max_new_tokens=climb.exam.max_new_tokens)

    return answer


def _eager(subject: Subject, climb: Climb, root: Sequence[Witness]) -> Answerer:
    model = subject.model()

    def answer(number: int, question: Question) -> Witness:
        return eager_witness(model, question, root[number], end_tokens=climb.exam.end_tokens)

    return answer


def _graphs(subject: Subject, variant: str, ours: Sequence[Witness]) -> Answerer:
    witness = GraphWitness(subject.folder, variant)

    def answer(number: int, question: Question) -> Witness:
        return witness.answer(question, ours[number])

    return answer
