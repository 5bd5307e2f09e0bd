"""Gathers the evidence of one compile: climbs the ladder rung by rung, and stops at a failing gate.

The order is chosen for memory, one copy of the weights at a time: the reference, then our model,
then the graphs of one variant after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from edgevlm.cache import digest
from edgevlm.checkpoint import Checkpoint
from edgevlm.evidence.bisect import Divergence
from edgevlm.evidence.eager import eager_witness
from edgevlm.evidence.exam import Exam
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
from edgevlm.plan import VariantPlan
from edgevlm_export.targets import TARGETS


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is measured: a checkpoint, and the model made of it by the passes.

    `spec` is the model's before any pass; `model` gives the model after so many passes, or all,
    and holds it until `release`. `forms` are those that are measured, the last one has had all
    passes. The keys are hashes of all that a model depends on.
    """

    checkpoint: Checkpoint
    checkpoint_key: str
    spec: VlmSpec
    model: Callable[[int | None], Vlm]
    release: Callable[[], None]
    forms: tuple[Form, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """A model on its way: after `count` passes. The first is `ours`, still lossless.

    `exam` asks it: with fewer visual tokens, the same questions are other prompts. `kind` is
    `model`, or by what was lost last `reduced` or `quantized`.
    """

    name: str
    count: int
    key: str
    exam: Exam
    kind: str = "model"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEvidence:
    """What the Hugging Face model and ours, in its last form, answered, and the rungs so far.

    `name` is that of the last form, `root` what its graphs and their runtime answer to: the
    Hugging Face model's answers, or where something was lost on the way the last form's own.
    `float_answers` are those of the last model before anything was rounded.
    """

    name: str
    reference: Sequence[Witness]
    float_answers: Sequence[Witness]
    ours: Sequence[Witness]
    root: Sequence[Witness]
    rungs: tuple[Rung, ...]


def model_evidence(subject: Subject, climb: Climb) -> ModelEvidence:
    """Hold our model to the reference; raise EvidenceError where a gate fails."""
    whole = climb.over(subject.forms[0].exam)
    reference = whole.witnesses("hf", subject.checkpoint_key, lambda: _referee(subject, whole))
    rungs = [whole.root(reference)]
    below = float_answers = reference
    for form in subject.forms:
        first = len(rungs) == 1
        here = climb.over(form.exam)
        above = here.witnesses(
            form.name,
            digest(form.key, [f.key for f in subject.forms[: len(rungs) - 1]]),
            partial(_eager, subject, here, form, below),
        )
        rung = here.rung(
            form.name,
            form.kind,
            rungs[-1].name,
            below,
            above,
            reference,
            complete=first or climb.generates,
        )
        demand(rung, (lambda: _origin(subject, whole)) if first else _nowhere)
        rungs.append(rung)
        # What follows is held to the answer that it gives, not to the one it was compared along.
        below = [witness.leading() for witness in above]
        float_answers = float_answers if form.kind == "quantized" else below
    return ModelEvidence(
        name=subject.forms[-1].name,
        reference=reference,
        float_answers=float_answers,
        ours=below,
        root=reference if len(subject.forms) == 1 else below,
        rungs=tuple(rungs),
    )


def graph_evidence(
    subject: Subject,
    climb: Climb,
    below: ModelEvidence,
    variant: VariantPlan,
    folder: Path,
    files_key: str,
) -> tuple[Rung, Rung]:
    """Hold a variant's graphs to our model, and the runtime to the graphs.

    `folder` holds a whole bundle, `files_key` is the hash of its content. Raises EvidenceError
    where a gate fails.
    """
    name, root = variant.target, below.root
    climb = climb.over(subject.forms[-1].exam)
    graphs = climb.witnesses(name, files_key, lambda: _graphs(folder, name, below.ours))
    last = below.rungs[-1]
    rung = climb.rung(
        name,
        "graph",
        below.name,
        below.ours,
        graphs,
        root,
        complete=False,
        lost=_lost(last) if last.kind == "quantized" else None,
    )
    demand(rung, lambda: _locate(subject, variant, folder))
    answers = climb.witnesses(
        f"{name}/runtime", files_key, lambda: RuntimeWitness(folder, name, climb.exam).answer
    )
    if not climb.generates and len(subject.forms) > 1:
        # Where our answers end at the first token that was lost, so do those held to them.
        pairs = zip(answers, root, strict=True)
        answers = [replace(ours, answer=ours.answer[: len(end.answer)]) for ours, end in pairs]
    top = climb.rung(
        f"{name}/runtime", "runtime", name, graphs, answers, root, scored=below.reference
    )
    demand(top, lambda: _locate(subject, variant, folder))
    return rung, top


def _lost(rung: Rung) -> dict[str, float]:
    """What rounding lost, by figure; a graph's visual tokens are those of its own features.

    A token that is chosen for its rounded score may be another one in every run: then the features
    that were chosen part, and so do the visual tokens that are made of them.
    """
    found = dict(rung.figures)
    for name in ("cosine", "max_error"):
        parts = [found[key] for key in (f"vision.{name}", f"projector.{name}") if key in found]
        if parts:
            found[f"projector.{name}"] = min(parts) if name == "cosine" else max(parts)
    return found


def _nowhere() -> None:
    """What is lost everywhere has no first place."""


def _origin(subject: Subject, climb: Climb) -> Divergence | None:
    """Bisect our model, before any pass, against the reference."""
    subject.release()
    return find_origin(subject.checkpoint, subject.spec, climb.exam.questions[0])


def _locate(subject: Subject, variant: VariantPlan, folder: Path) -> Divergence | None:
    """Bisect the graphs of a variant in the order in which they run."""
    model = subject.model(None)
    for planned in variant.graphs:
        path = folder / graph_file(variant, planned)
        engine = TARGETS[variant.target].engine.options
        found = find_fault(module_of(model, variant, planned), path, engine)
        if found is not None:
            return found
    return None


def _referee(subject: Subject, climb: Climb) -> Answerer:
    referee = Referee(subject.checkpoint, subject.spec)

    def answer(number: int, question: Question) -> Witness:
        return referee.answer(question, max_new_tokens=climb.exam.max_new_tokens)

    return answer


def _eager(subject: Subject, climb: Climb, form: Form, reference: Sequence[Witness]) -> Answerer:
    model = subject.model(form.count)

    def answer(number: int, question: Question) -> Witness:
        return eager_witness(
            model,
            question,
            reference[number],
            end_tokens=climb.exam.end_tokens,
            max_new_tokens=climb.exam.max_new_tokens,
            lossy=form is not subject.forms[0],
            reduces=form.kind == "reduced",
            generates=climb.generates or form is subject.forms[0],
        )

    return answer


def _graphs(folder: Path, variant: str, ours: Sequence[Witness]) -> Answerer:
    witness = GraphWitness(folder, variant)

    def answer(number: int, question: Question) -> Witness:
        return witness.answer(question, ours[number])

    return answer
