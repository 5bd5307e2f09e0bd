"""Evidence site by site: the noise of each quantized map, its harm, and what float would save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from edgevlm.evidence.eager import eager_witness
from edgevlm.evidence.exam import Exam
from edgevlm.evidence.measures import logits_agreement
from edgevlm.evidence.witness import Witness
from edgevlm.model.vlm import Vlm
from edgevlm.progress import Progress
from edgevlm.quant.calibrate import CalibrationCase
from edgevlm.quant.harm import extra_bytes, logits_along, site_harms, site_noises, swapped

NOISE_SAMPLES = 4
HARM_SAMPLES = 6
LEFT_IN_FLOAT = (1, 4, 16)


def site_evidence(
    float_model: Vlm,
    quantized: Vlm,
    exam: Exam,
    reference: Sequence[Witness],
    progress: Progress,
) -> dict[str, Any]:
    """`noise` of every site in order, `harm` with the worst site first, `what_if` a few were float.

    `reference` are the answers of the float model, along which all is measured. Where a right
    answer means nothing (drawn weights) there is noise alone.
    """
    cases = [
        CalibrationCase(question=question, answer=witness.answer)
        for question, witness in zip(exam.questions, reference, strict=True)
    ]
    # Long answers have many rows to tell by, and short ones are what most tasks want.
    telling = [*sorted(cases, key=lambda case: -len(case.answer))[: HARM_SAMPLES // 2], *cases]
    noises = site_noises(float_model, quantized, telling[:NOISE_SAMPLES])
    report: dict[str, Any] = {"noise": [asdict(row) for row in noises], "harm": [], "what_if": []}
    if exam.score is None:
        return report
    harms = site_harms(float_model, quantized, telling[:HARM_SAMPLES], progress)
    report["harm"] = [asdict(row) for row in harms]
    worst = [harm.site for harm in harms]
    float_logits = logits_along(float_model, cases)
    counts = [0, *(count for count in LEFT_IN_FLOAT if count < len(worst))]
    with progress.stage("what if sites were float", len(counts)) as advance:
        for count in counts:
            left = worst[:count]
            with swapped(quantized, float_model, left):
                agreement = logits_agreement(float_logits, logits_along(quantized, cases))
                accuracy = _accuracy(quantized, exam, reference)
            report["what_if"].append(
                {
                    "sites": left,
                    "kl": agreement.kl,
                    "argmax": agreement.argmax,
                    "accuracy": accuracy,
                    "extra_bytes": extra_bytes(quantized, left),
                }
            )
            advance(1)
    return report


def _accuracy(model: Vlm, exam: Exam, reference: Sequence[Witness]) -> float | None:
    """The mean accuracy of a model's own answers."""
    found = [
        eager_witness(
            model,
            question,
            parent,
            end_tokens=exam.end_tokens,
            max_new_tokens=exam.max_new_tokens,
            lossy=True,
        )
        for question, parent in zip(exam.questions, reference, strict=True)
    ]
    accuracy: float | None = exam.accuracy(found).get("mean_accuracy")
    return accuracy
