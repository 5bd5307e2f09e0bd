"""An exam: the samples that every rung answers, preprocessed once, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from edgevlm.cache import digest
from edgevlm.evidence.witness import Question, Witness, ask
from edgevlm.samples import Sample
from edgevlm_runtime.image import ImageSpec
from edgevlm_runtime.text import TextSpec

Score = Callable[[Sequence[Sample], Sequence[str]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """The samples of a ladder, preprocessed, and how answers are scored.

    `score` is None where a right answer means nothing: a model of random weights.
    """

    samples: Sequence[Sample]
    questions: Sequence[Question]
    tokenizer: Tokenizer
    end_tokens: frozenset[int]
    max_new_tokens: int
    score: Score | None

    @property
    def digest(self) -> str:
        """Hash of everything that is asked."""
        return digest(
            self.max_new_tokens,
            sorted(self.end_tokens),
            [
                [
                    question.prompt.token_ids.tobytes(),
                    question.prompt.positions.tobytes(),
                    [
                        [name, array.tobytes()]
                        for feed in question.feeds
                        for name, array in feed.items()
                    ],
                ]
                for question in self.questions
            ],
        )

    def accuracy(self, witnesses: Sequence[Witness]) -> Mapping[str, Any]:
        """Task accuracy of complete answers."""
        if self.score is None:
            return {}
        return self.score(self.samples, [self.text(witness.answer) for witness in witnesses])

    def text(self, answer: Sequence[int]) -> str:
        """The text of an answer, its end token left out."""
        kept = [token for token in answer if token not in self.end_tokens]
        decoded: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return decoded


def prepare_exam(
    samples: Sequence[Sample],
    image: Mapping[str, Any],
    text: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    end_tokens: frozenset[int],
    max_new_tokens: int,
    score: Score | None,
    num_axes: int | None = None,
) -> Exam:
    """Preprocess the samples as the runtime will, by the manifest's image and text sections.

    `num_axes` are those of the rotary embedding.
    """
    image_spec, text_spec = ImageSpec.from_json(image), TextSpec.from_json(text)
    return Exam(
        samples=samples,
        questions=[ask(sample, image_spec, text_spec, tokenizer, num_axes) for sample in samples],
        tokenizer=tokenizer,
        end_tokens=end_tokens,
        max_new_tokens=max_new_tokens,
        score=score,
    )
