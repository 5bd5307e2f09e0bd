"""The Decoder protocol: what a decoding strategy may ask of a compiled language model.

Length and position are two things. The *length* is the number of rows consumed, and decides which
state slots are used; the *position* is where the rotary embedding stands, and may be three numbers,
or a fraction. A prompt carries a position per row and the position that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from edgevlm_runtime.engine import Array

# T rows of this call, R rows that logits are wanted for, W width, V vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Rows to prefill, embedded: `embeds` float32 [T, W], `positions` [T] or [3, T].

    `next_position` is one number, or three, for the first row after the prompt. `values` are named
    outputs of graphs that ran before, for step graphs with inputs of source `output:NAME`.
    `picture_rows` int64 [P] says where each picture group begins: the visual tokens of one call of
    the vision graph, in consecutive rows. `row_weights` float32 [T], by kind, are for step graphs
    that ask for them.
    """

    embeds: Array
    positions: Array
    next_position: float | Sequence[float]
    values: Mapping[str, Array] = field(default_factory=dict)
    picture_rows: Array = field(default_factory=lambda: np.empty(0, np.int64))
    row_weights: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a call gave: `logits` float32 [R, V] and the graphs' other named outputs.

    Where several graph calls were needed, extras [1, T, ..] are joined, of others the last one is
    given. The arrays are the decoder's own buffers and hold until its next call: copy what you
    keep.
    """

    logits: Array
    extras: Mapping[str, Array] = field(default_factory=dict)


class Cancelled(Exception):  # noqa: N818 (a request was obeyed, nothing went wrong)
    """A prefill was given up between two chunks, because it was asked to."""


class Decoder(Protocol):
    """A language model with its state: consume rows, give logits, go back."""

    @property
    def length(self) -> int:
        """Rows consumed so far."""
        ...

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        ...

    def prefill(self, prompt: Prompt, *, cancelled: Callable[[], bool] | None = None) -> Step:
        """Consume a prompt in chunks; logits [1, V] of its last row.

        `cancelled` is asked between chunks; `Cancelled` is raised where it says yes, and `length`
        then tells what was consumed. A graph of the phase `picture` reads its prompt in one chunk.
        Raises InputError where the prompt does not fit, before any row is consumed.
        """
        ...

    def extend(
        self,
        tokens: Sequence[int],
        *,
        rows: Sequence[int] | None = None,
        values: Mapping[str, Array] | None = None,
    ) -> Step:
        """Consume tokens; logits [R, V] of `rows` of them (ascending), of all by default.

        `values` are named outputs for graphs with inputs of source `output:NAME`. Raises InputError
        where a token or a row does not exist, or where the tokens do not fit.
        """
        ...

    def rewind(self, length: int) -> None:
        """Forget all rows from `length` on.

        0 is always possible; EngineError where a state does not remember that length.
        """
        ...

    def fork(self) -> Decoder:
        """An independent decoder in the same state, on the same loaded graphs."""
        ...
