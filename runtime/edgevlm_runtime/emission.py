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
        self._pieces: list[str] = []
        self._held = ""
        self.stopped = False

    @property
    def text(self) -> str:
        """What was emitted so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """Take a token, give the text that is certain now."""
        piece = self._stream.step(self._tokenizer, token)
        if piece is None:
            return ""
        text = self._held + piece
        end = self._end(text) if self._stop else len(text)
        self._held = text[end:]
        self._pieces.append(text[:end])
        return self._pieces[-1]

    def finish(self, tokens: Sequence[int]) -> str:
        """Give what was held back, after the last of all `tokens`."""
        if self.stopped:
            return ""
        decoded = self.text + self._held
        whole = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        # The stream keeps half a character to itself; at the end it becomes a replacement mark.
        rest = self._held + whole[len(decoded) :] if whole.startswith(decoded) else self._held
        end = self._found(rest)
        self._pieces.append(rest[:end])
        return self._pieces[-1]

    def _end(self, text: str) -> int:
        """Where text that is not emitted yet stops being certain: at what may be a stop string."""
        end = self._found(text)
        if self.stopped:
            return end
        for size in range(min(self._longest - 1, end), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return end - size
        return end

    def _found(self, text: str) -> int:
        """Where the first stop string begins, which ends the text, else the end of the text."""
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(places)
        return min(places, default=len(text))
