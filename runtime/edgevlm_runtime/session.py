"""A session: prompts and pictures in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.completion import Completion, StreamEvent
from edgevlm_runtime.decode.protocol import Decoder, Prompt
from edgevlm_runtime.image import ImageSource
from edgevlm_runtime.text import Messages


class Session:
    """A bundle with its graphs loaded. One owner at a time; `cancel` may come from any thread."""

    bundle: Bundle
    decoder: Decoder

    def __init__(self, bundle: Bundle) -> None:
        """Load the graphs that an ordinary answer needs; others are loaded at first use."""
        raise NotImplementedError

    def encode(self, prompt: Messages, images: Sequence[ImageSource] = ()) -> Prompt:
        """Tokenize, run the graphs before the decoder, and put their rows into the prompt."""
        raise NotImplementedError

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
    ) -> Completion:
        """Answer a prompt; what is not given is taken from the bundle's generation defaults."""
        raise NotImplementedError

    def stream(
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
    ) -> Iterator[StreamEvent]:
        """Answer token by token; the last event carries the completion."""
        raise NotImplementedError

    def cancel(self) -> None:
        """End the generation in progress at its next token or prompt chunk, from any thread."""
        raise NotImplementedError
