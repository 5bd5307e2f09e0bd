"""A gate between two resolutions: the small picture first, the whole one where that is not enough.

After VisionThink (arXiv 2507.13348), whose model learns to ask for the whole picture. Here no
model is trained: the entropy of the first token of the answer to the small picture decides, which a
threshold is held against. Two sessions answer, of bundles or variants of two resolutions.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from edgevlm_runtime.completion import Completion, StreamEvent
from edgevlm_runtime.errors import InputError
from edgevlm_runtime.image import ImageSource
from edgevlm_runtime.session import Session
from edgevlm_runtime.text import Messages

__all__ = ["GatedCompletion", "ResolutionGate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedCompletion:
    """An answer, and who gave it.

    `entropy` is that of the first token for the small picture. `low_ms` and `full_ms` are what
    either session took: `low_ms` up to its first token where the other one answered, `full_ms` None
    where that was not asked.
    """

    completion: Completion
    answered: Literal["low", "full"]
    entropy: float | None
    low_ms: float
    full_ms: float | None = None

    @property
    def total_ms(self) -> float:
        """Milliseconds from question to answer."""
        return self.low_ms + (self.full_ms or 0.0)


class ResolutionGate:
    """Two sessions with a threshold between them."""

    def __init__(self, low: Session, full: Session, threshold: float) -> None:
        """Ask `full` where the first token for `low` has more than `threshold` nats of entropy."""
        if math.isnan(threshold):
            raise InputError(
                "threshold is not a number", hint="give an entropy in nats, such as 0.5"
            )
        if low is full:
            raise InputError(
                "both sessions are one", hint="open a session for each of the two resolutions"
            )
        self.low, self.full, self.threshold = low, full, threshold
        self._cancelled = threading.Event()

    def generate(
        self,
        prompt: Messages,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> GatedCompletion:
        """Answer a prompt; `Session.stream` says what the arguments are.

        Without pictures there is nothing to see better, and the gate stays shut.
        """
        self._cancelled.clear()

        def ask(session: Session) -> Generator[StreamEvent, None, None]:
            return session.stream(
                prompt,
                images,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop=stop,
                seed=seed,
            )

        started = perf_counter()
        with closing(ask(self.low)) as events:
            event = next(events)
            entropy = event.entropy
            fires = bool(images) and self._fires(entropy)
            while not fires and event.completion is None:
                event = next(events)
        asked = perf_counter()
        low_ms, full_ms = 1000 * (asked - started), None
        if fires:
            with closing(ask(self.full)) as events:
                while (event := next(events)).completion is None:
                    # Whoever cancelled before this session began was not heard by it.
                    if self._cancelled.is_set():
                        self.full.cancel()
            full_ms = 1000 * (perf_counter() - asked)
        assert event.completion is not None, "the last event carries the completion"
        return GatedCompletion(
            completion=event.completion,
            answered="full" if fires else "low",
            entropy=entropy,
            low_ms=low_ms,
            full_ms=full_ms,
        )

    def cancel(self) -> None:
        """End the generation in progress, whichever session has it, from any thread."""
        self._cancelled.set()
        self.low.cancel()
        self.full.cancel()

    def _fires(self, entropy: float | None) -> bool:
        """Whether the small picture was not enough; who is cancelled asks nobody else."""
        if entropy is None or self._cancelled.is_set():
            return False
        return entropy > self.threshold
