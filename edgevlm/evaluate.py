"""Evaluation: a bundle answers questions; its answers are scored and held against the referee."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.cache import StageCache, code_version, digest
from edgevlm.checkpoint import open_checkpoint
from edgevlm.evidence.exam import Exam, prepare_exam
from edgevlm.families.image_spec import ImageChoices
from edgevlm.model.spec import VlmSpec
from edgevlm.progress import Progress
from edgevlm.samples import Sample, score_answers
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.completion import Completion
from edgevlm_runtime.errors import InputError
from edgevlm_runtime.image import ImageSpec, NativeGeometry, TiledGeometry
from edgevlm_runtime.session import Session
from edgevlm_runtime.text import load_tokenizer

REFEREE_BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """How a bundle did: scores, and where a referee answered too, its scores and the agreement.

    `accuracy` and `reference` are `{mean_accuracy, tasks: {name: {accuracy, low, high, n}}}`;
    `token_agreement` is the share of questions answered with exactly the referee's tokens, and
    `differing` has the numbers of the others.
    """

    accuracy: Mapping[str, Any]
    answers: tuple[str, ...]
    reference: Mapping[str, Any] | None = None
    token_agreement: float | None = None
    differing: tuple[int, ...] = ()


def evaluate(
    bundle: Bundle,
    samples: Sequence[Sample],
    *,
    progress: Progress,
    cache: StageCache,
    referee: Path | None = None,
    max_new_tokens: int | None = None,
) -> EvalReport:
    """Put samples to a bundle, greedily; `referee` is the checkpoint that is to answer too.

    The referee's answers are kept in the cache: every variant is held against the same ones.
    """
    # Every file, those that this variant does not read included, before there is any figure.
    bundle.check()
    longest = max_new_tokens or bundle.manifest.generation.max_new_tokens
    completions = _completions(Session(bundle), samples, longest, progress)
    texts = [completion.text for completion in completions]
    accuracy = score_answers(samples, texts)
    if referee is None:
        return EvalReport(accuracy=accuracy, answers=tuple(texts))
    checkpoint = open_checkpoint(str(referee))
    exam = _exam(bundle, checkpoint.spec(_choices(bundle.manifest.image)), samples, longest)
    key = digest(code_version(), checkpoint.content_key(), exam.digest)

    def ask_referee() -> dict[str, Any]:
        from edgevlm.evidence.referee import Referee

        spec = checkpoint.architecture(_choices(bundle.manifest.image))
        return {"answers": _ask(Referee(checkpoint, spec).tokens, exam, progress)}

    theirs = cache.json("referee", key, ask_referee)["answers"]
    differing = tuple(
        number
        for number, (ours, full) in enumerate(zip(completions, theirs, strict=True))
        if list(ours.tokens) != [token for token in full if token not in exam.end_tokens]
    )
    return EvalReport(
        accuracy=accuracy,
        answers=tuple(texts),
        reference=score_answers(samples, [exam.text(answer) for answer in theirs]),
        token_agreement=1.0 - len(differing) / len(samples),
        differing=differing,
    )


def _completions(
    session: Session, samples: Sequence[Sample], max_new_tokens: int, progress: Progress
) -> list[Completion]:
    """Greedy answers of the bundle; raises InputError that names the question it cannot take."""
    completions = []
    with progress.stage("questions", len(samples)) as advance:
        for number, sample in enumerate(samples, start=1):
            try:
                completion = session.generate(
                    sample.messages, sample.images, max_new_tokens=max_new_tokens, temperature=0.0
                )
            except InputError as error:
                message = f"question {number} of {len(samples)}: {error.message}"
                raise InputError(message, hint=error.hint) from error
            completions.append(completion)
            advance(1)
    return completions


def _exam(bundle: Bundle, spec: VlmSpec, samples: Sequence[Sample], max_new_tokens: int) -> Exam:
    """The samples as the referee is asked, whose pictures have all their tokens."""
    manifest = bundle.manifest
    return prepare_exam(
        samples,
        spec.image,
        spec.text,
        load_tokenizer(bytes(bundle.file("tokenizer.json"))),
        end_tokens=frozenset(manifest.generation.eos_token_ids),
        max_new_tokens=max_new_tokens,
        score=None,
    )


def _choices(image: Mapping[str, Any]) -> ImageChoices:
    """The choices about pictures that a bundle was compiled with."""
    geometry = ImageSpec.from_json(image).geometry
    return ImageChoices(
        split=geometry.split if isinstance(geometry, TiledGeometry) else None,
        grids=geometry.grids if isinstance(geometry, NativeGeometry) else None,
    )


def _ask(answer: Callable[..., list[list[int]]], exam: Exam, progress: Progress) -> list[list[int]]:
    """Ask in batches of prompts of one length with as many pictures: those need no padding."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, question in enumerate(exam.questions):
        shape = (len(question.prompt.token_ids), len(question.feeds))
        alike.setdefault(shape, []).append(number)
    answers: dict[int, list[int]] = {}
    with progress.stage("referee", len(exam.questions)) as advance:
        for numbers in alike.values():
            for start in range(0, len(numbers), REFEREE_BATCH):
                batch = numbers[start : start + REFEREE_BATCH]
                questions = [exam.questions[number] for number in batch]
                found = answer(questions, max_new_tokens=exam.max_new_tokens)
                answers |= dict(zip(batch, found, strict=True))
                advance(len(batch))
    return [answers[number] for number in range(len(exam.questions))]
