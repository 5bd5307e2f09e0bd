"""Text as it becomes certain: incremental detokenization, and stop strings.

A token may be a piece of a character, and the end of a text may be the beginning of a stop string;
both are held back until it is decided what they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from edgevlm_runtime.errors import InputError


class Emission:
    """The text of a completion; it ends before the stop string that is complete first."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Start empty."""
        if isinstance(stop, str) or "" in stop:
            raise InputError(
                f"stop must be a list of texts that are not empty, got {stop!r}",
                hint="leave it out for no stop strings",
            )
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._decoded = ""
        self._emitted = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """What was emitted so far."""
        return self._decoded[: self._emitted]

    def push(self, token: int) -> str:
        """Take a token, give the text that is certain now."""
        piece = self._stream.step(self._tokenizer, token)
        if piece is None:
            return ""
        self._decoded += piece
        return self._emit(hold_back=True)

    def finish(self, tokens: Sequence[int]) -> str:
        """Give what was held back, after the last of all `tokens`."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        # The stream keeps half a character to itself; at the end it becomes a replacement mark.
        if whole.startswith(self._decoded):
            self._decoded = whole
        return self._emit(hold_back=False)

    def _emit(self, *, hold_back: bool) -> str:
        """Emit up to a stop string, or up to what could become one."""
        begin, end = self._emitted, len(self._decoded)
        found = [place for stop in self._stop if (place := self._decoded.find(stop, begin)) >= 0]
        if found:
            end, self.stopped = min(found), True
        elif hold_back and self._stop:
            end -= self._held(begin)
        self._emitted = end
        return self._decoded[begin:end]

    def _held(self, begin: int) -> int:
        """How much of the end, after `begin`, is the beginning of a stop string."""
        for size in range(min(self._longest - 1, len(self._decoded) - begin), 0, -1):
            if any(stop.startswith(self._decoded[-size:]) for stop in self._stop):
                return size
        return 0
