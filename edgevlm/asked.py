"""What a recipe has a model asked: the samples of its evidence, and those of calibration."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from edgevlm.cache import digest
from edgevlm.evidence.exam import Exam, prepare_exam
from edgevlm.families.silent import silent_tokens
from edgevlm.model.spec import VlmSpec
from edgevlm.quant.calibrate import CalibrationCase, calibration_cases
from edgevlm.recipe import Recipe
from edgevlm.samples import Sample, content_of, cover_grids, draw_samples, score_answers
from edgevlm_runtime.images.spec import Geometry, ImageSpec, NativeGeometry
from edgevlm_runtime.text import TextSpec, load_tokenizer

__all__ = ["Asked"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Samples as a recipe draws them, for a model of this spec.

    `tokenizer` is the content of tokenizer.json, `capacity` the rows of a session; `is_drawn` says
    that the weights are random, so that a right answer means nothing.
    """

    recipe: Recipe
    spec: VlmSpec
    tokenizer: bytes
    capacity: int
    is_drawn: bool

    @property
    def text(self) -> Mapping[str, Any]:
        """The manifest's text section.

        It names the silent tokens where a stage asks for the words of a question: no spec knows
        them, because it takes the tokenizer to tell.
        """
        reduction, text = self.spec.reduction, self.spec.text
        if reduction is None or "words" not in reduction.asks:
            return text
        silent = _silent_tokens(self.tokenizer, json.dumps(text, sort_keys=True))
        return {**text, "silent_tokens": list(silent)}

    def exam(self) -> Exam:
        """The samples of the evidence; raises RecipeError where a session has no room for one."""
        options = self.recipe.evidence
        samples = draw_samples(
            None if options.data is None else self.recipe.path.parent / options.data,
            split="calibration",
            count=options.samples,
            seed=self.recipe.seed,
        )
        exam = prepare_exam(
            cover_grids(samples, self._geometry),
            self.spec.image,
            self.text,
            load_tokenizer(self.tokenizer),
            end_tokens=frozenset(self.spec.generation.eos_token_ids),
            max_new_tokens=options.max_new_tokens,
            score=None if self.is_drawn else score_answers,
            num_axes=self.spec.decoder.rope.num_axes,
        )
        self._check_context(exam)
        return exam

    def note(self, exam: Exam) -> dict[str, Any]:
        """What was asked; `pictures` has a line for every vision grid, asked about or not."""
        shapes = Counter(
            (image.layout.grid, image.layout.tiles)
            for question in exam.questions
            for image in question.images
        )
        if isinstance(self._geometry, NativeGeometry):
            shapes.update({(grid, (0, 0)): 0 for grid in self._geometry.grids})
        return {
            "data": self.recipe.evidence.data or "scenes, calibration split",
            "count": len(exam.samples),
            "seed": self.recipe.seed,
            "max_new_tokens": exam.max_new_tokens,
            "sha256": exam.digest,
            "weights": "drawn" if self.is_drawn else "trained",
            "pictures": [
                {"grid": grid, "tiles": tiles, "count": count}
                for (grid, tiles), count in shapes.items()
            ],
        }

    def calibration(self) -> list[CalibrationCase]:
        """The samples of calibration, preprocessed, with their right answers."""
        return calibration_cases(
            cover_grids(self._calibration_samples(), self._geometry),
            ImageSpec.from_json(self.spec.image),
            TextSpec.from_json(self.text),
            load_tokenizer(self.tokenizer),
            min(self.spec.generation.eos_token_ids, default=0),
            self.spec.decoder.rope.num_axes,
        )

    def calibration_key(self) -> str:
        """Hash of the calibration samples, where a pass looks at them."""
        if not any(step.calibrates for step in self.recipe.passes):
            return ""
        options = self.recipe.calibration
        drawn = [] if options.data is None else self._calibration_samples()
        return digest(options, [content_of(sample) for sample in drawn])

    @property
    def _geometry(self) -> Geometry:
        return ImageSpec.from_json(self.spec.image).geometry

    def _calibration_samples(self) -> list[Sample]:
        options = self.recipe.calibration
        folder = None if options.data is None else self.recipe.path.parent / options.data
        return draw_samples(folder, split="calibration", count=options.samples, seed=options.seed)

    def _check_context(self, exam: Exam) -> None:
        """Refuse samples that a session has no room for, before anything is measured."""
        rows = max(len(question.prompt.token_ids) for question in exam.questions)
        needed = rows + exam.max_new_tokens
        if needed > self.capacity:
            raise self.recipe.error(
                f"the evidence's longest sample takes {needed} rows ({rows} of prompt, "
                f"{exam.max_new_tokens} of answer), the context has {self.capacity}",
                "context",
                "capacity",
                hint=f"set context.capacity to at least {needed}, or choose other samples with "
                "evidence.data",
            )


@lru_cache(maxsize=1)
def _silent_tokens(tokenizer: bytes, text: str) -> tuple[int, ...]:
    """Those of a tokenizer and a text section; every form of a model is asked with the same."""
    return silent_tokens(load_tokenizer(tokenizer), TextSpec.from_json(json.loads(text)))
