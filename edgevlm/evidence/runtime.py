"""The runtime as a witness: whole answers to the samples as a user would ask them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgevlm.evidence.exam import Exam
from edgevlm.evidence.witness import Question, Witness
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.session import Session


class RuntimeWitness:
    """One variant of a bundle, answering through its session."""

    def __init__(self, folder: Path, variant: str, exam: Exam) -> None:
        """Open the variant; `folder` holds a whole bundle, published or not."""
        self._session = Session(Bundle.open(folder, variant))
        self._exam = exam

    def answer(self, number: int, question: Question) -> Witness:
        """Answer a sample from its own pictures and messages, greedily."""
        sample = self._exam.samples[number]
        completion = self._session.generate(
            sample.messages,
            sample.images,
            max_new_tokens=self._exam.max_new_tokens,
            temperature=0.0,
        )
        end = self._session.bundle.manifest.generation.eos_token_ids
        ended = completion.finish_reason == "eos"
        # The session leaves the end token out, the reference keeps it; with several, any may end.
        answer = (*completion.tokens, min(end)) if ended else completion.tokens
        empty = np.zeros((0, 1), np.float32)
        return Witness(vision=(), projector=(), answer=answer, logits=empty)
