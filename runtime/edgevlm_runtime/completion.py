"""What a generation gives: its text and tokens, why it ended, and how long each part took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["eos", "stop", "length", "context", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Milliseconds per part. `token_ms` has one entry per decode step, sampling included."""

    preprocess_ms: float
    vision_ms: float
    prefill_ms: float
    token_ms: tuple[float, ...]

    @property
    def first_token_ms(self) -> float:
        """Time to the first token."""
        return self.preprocess_ms + self.vision_ms + self.prefill_ms

    @property
    def tokens_per_second(self) -> float:
        """Decode speed, the first token left out; 0.0 where there was no second token."""
        total = sum(self.token_ms)
        return 1000.0 * len(self.token_ms) / total if total else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer.

    `tokens` are the generated ids without the end-of-sequence token, whose place is told by
    `finish_reason == "eos"`; `text` ends before a stop string. `context`: the state is full.
    `notes` say where a picture could not be treated as its own size calls for. `entropy` is that of
    the first token in nats, by the logits alone: 0 where the model is sure, the logarithm of the
    vocabulary where it knows nothing, None where it was cancelled before.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    notes: tuple[str, ...] = ()
    entropy: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamEvent:
    """One step of a stream: the text that became certain, and the token that was drawn.

    `text` may be empty while a character or a possible stop string is incomplete. The last event
    has the `completion`; its `token` is None where the stream ended without drawing one. Every
    event has the `entropy` of the completion that it belongs to.
    """

    text: str
    token: int | None
    elapsed_ms: float
    completion: Completion | None = None
    entropy: float | None = None
