"""A session: prompts and pictures in, text out."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

import numpy as np

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.completion import Completion, FinishReason, StreamEvent, Timings
from edgevlm_runtime.decode.decoder import StepDecoder, open_decoder
from edgevlm_runtime.decode.protocol import Cancelled, Prompt
from edgevlm_runtime.emission import Emission
from edgevlm_runtime.encoder import IMAGE_EMBEDS, IMAGE_POSITIONS, TEXT_EMBEDS, Encoder
from edgevlm_runtime.engine import Array, Engines
from edgevlm_runtime.engines.table import EmbeddingTable, open_table
from edgevlm_runtime.errors import BundleError, InputError, ResourceError
from edgevlm_runtime.image import ImageSource, ImageSpec, PreparedImage, load_image, prepare
from edgevlm_runtime.positions import placed_positions
from edgevlm_runtime.sample import Sampler, Sampling, entropy
from edgevlm_runtime.text import EncodedPrompt, Messages, TextSpec, encode_prompt, load_tokenizer

TOKENIZER = "tokenizer.json"
EMBEDDING = "embedding"


class Session:
    """A bundle with its graphs loaded.

    A session has one owner at a time: whoever calls it while a generation is in progress, in
    another thread or in this one, gets a `ResourceError`. `cancel` alone may be called by anybody.
    A stream that is not read to its end is in progress until it is closed.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Load the graphs that an ordinary answer needs; others are loaded at first use."""
        self.bundle = bundle
        self.engines = Engines(bundle)
        self.tokenizer = load_tokenizer(bytes(bundle.file(TOKENIZER)))
        self._text = TextSpec.from_json(bundle.manifest.text)
        rope = bundle.variant.rope
        self._num_axes = None if rope is None else rope.num_axes
        image = bundle.manifest.image
        self._image = ImageSpec.from_json(image) if image else None
        self._encoder = Encoder(bundle, self.engines)
        self._table = _open_embedding(bundle)
        self.decoder = self.open_decoder()
        self._encoder.load()
        self.decoder.load()
        bundle.check()
        self._owner = threading.Lock()
        self._cancelled = threading.Event()

    def load(self) -> None:
        """Load every graph of the variant now, so that no later call has to wait for one."""
        for graph in self.bundle.variant.graphs:
            if graph.role != EMBEDDING:
                self.engines.open(graph)

    def open_decoder(self, role: str = "step") -> StepDecoder:
        """Another decoder, with a state of its own, over the graphs of a role."""
        return open_decoder(self.bundle, self.engines, self._table, role)

    def encode(self, prompt: Messages, images: Sequence[ImageSource] = ()) -> Prompt:
        """Tokenize, run the graphs before the decoder, and put their rows into the prompt."""
        with self._owned():
            encoded, pictures = self._prepared(prompt, images)
            return self._embedded(encoded, pictures)

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
        """Answer a prompt; `stream` says what the arguments are and which errors there may be."""
        *_, last = self.stream(
            prompt,
            images,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
        )
        assert last.completion is not None, "the last event carries the completion"
        return last.completion

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
    ) -> Generator[StreamEvent, None, None]:
        """Answer token by token; the last event carries the completion.

        `prompt` is a question or a conversation of messages. `images` are paths, encoded bytes,
        PIL pictures or uint8 arrays [H, W, 3], in the order of their places in the prompt.
        What is not given is taken from the bundle's generation defaults. A temperature of 0 is
        greedy; `top_k` and `top_p` narrow the choice in this order; the same seed draws the same
        tokens. The text ends before the first of the `stop` strings.

        Arguments are checked at the call, prompt and pictures at the first event: `InputError` for
        those that cannot be used, `ResourceError` while another generation is in progress,
        `EngineError` where a graph fails or gives no finite logits.
        """
        defaults = self.bundle.manifest.generation
        limit = defaults.max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {limit}")
        sampling = Sampling(
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
        )
        emission = Emission(self.tokenizer, stop)
        return self._stream(prompt, images, limit, Sampler(sampling, seed), emission)

    def cancel(self) -> None:
        """End the generation in progress at its next token or prompt chunk, from any thread.

        A generation that has not begun yet is not affected.
        """
        self._cancelled.set()

    def _stream(
        self,
        prompt: Messages,
        images: Sequence[ImageSource],
        limit: int,
        sampler: Sampler,
        emission: Emission,
    ) -> Generator[StreamEvent, None, None]:
        """The loop: prefill and draw, then emit, extend and draw until there is a reason to end."""
        with self._owned():
            self._cancelled.clear()
            started = perf_counter()
            decoder = self.decoder
            decoder.rewind(0)
            encoded, pictures = self._prepared(prompt, images)
            decoder.check_prompt(len(encoded.token_ids), len(encoded.picture_rows))
            prepared = perf_counter()
            embedded = self._embedded(encoded, pictures)
            seen = perf_counter()

            reason: FinishReason | None = None
            token, surprise = -1, None
            try:
                step = decoder.prefill(embedded, cancelled=self._cancelled.is_set)
                token = sampler.draw(step.logits[0])
                surprise = entropy(step.logits[0])
            except Cancelled:
                reason = "cancelled"
            prefilled = perf_counter()

            eos = frozenset(self.bundle.manifest.generation.eos_token_ids)
            room = decoder.capacity - decoder.length
            tokens: list[int] = []
            token_ms: list[float] = []
            piece, emitted = "", None
            while reason is None:
                if token in eos:
                    reason, piece, emitted = "eos", "", None
                    break
                tokens.append(token)
                piece, emitted = emission.push(token), token
                if emission.stopped:
                    reason = "stop"
                elif len(tokens) >= limit:
                    reason = "length"
                elif len(tokens) > room:
                    reason = "context"
                elif self._cancelled.is_set():
                    reason = "cancelled"
                else:
                    yield StreamEvent(
                        text=piece,
                        token=token,
                        elapsed_ms=1000 * (perf_counter() - started),
                        entropy=surprise,
                    )
                    begun = perf_counter()
                    token = sampler.draw(decoder.extend((token,)).logits[0])
                    token_ms.append(1000 * (perf_counter() - begun))
            piece += emission.finish(tokens)
            completion = Completion(
                text=emission.text,
                tokens=tuple(tokens),
                finish_reason=reason,
                timings=Timings(
                    preprocess_ms=1000 * (prepared - started),
                    vision_ms=1000 * (seen - prepared),
                    prefill_ms=1000 * (prefilled - seen),
                    token_ms=tuple(token_ms),
                ),
                notes=tuple(picture.note for picture in pictures if picture.note is not None),
                entropy=surprise,
            )
            yield StreamEvent(
                text=piece,
                token=emitted,
                elapsed_ms=1000 * (perf_counter() - started),
                completion=completion,
                entropy=surprise,
            )

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Hold the session, or say that somebody else does."""
        if not self._owner.acquire(blocking=False):
            raise ResourceError(
                "this session is in use: a generation is in progress",
                hint="read its stream to the end or close it, or open a session per thread",
            )
        try:
            yield
        finally:
            self._owner.release()

    def _prepared(
        self, prompt: Messages, images: Sequence[ImageSource]
    ) -> tuple[EncodedPrompt, list[PreparedImage]]:
        """Token ids with places for the pictures, and the pictures as graph inputs."""
        pictures = []
        if images:
            if self._image is None:
                raise InputError(
                    f"bundle {self.bundle.manifest.name!r} takes no pictures, got {len(images)}",
                    hint="ask without a picture, or use a bundle of a vision-language model",
                )
            pictures = [prepare(load_image(image, self._image), self._image) for image in images]
        layouts = [picture.layout for picture in pictures]
        encoded = encode_prompt(prompt, layouts, self._text, self.tokenizer, self._num_axes)
        highest = int(encoded.token_ids.max(initial=0))
        if highest >= self._table.vocab_size:
            raise BundleError(
                f"the tokenizer gave token {highest}, the embedding has {self._table.vocab_size}",
                hint="compile the bundle again with the tokenizer of its checkpoint",
            )
        return encoded, pictures

    def _embedded(self, encoded: EncodedPrompt, pictures: Sequence[PreparedImage]) -> Prompt:
        """The rows of the prompt: embedded tokens, and what the graphs make of the pictures."""
        embeds = self._table.rows(encoded.token_ids)
        is_text = np.ones(len(embeds), bool)
        is_text[encoded.image_rows] = False
        weights = {kind: rows[is_text] for kind, rows in encoded.row_weights.items()}
        values = self._encoder.run(pictures, embeds[is_text], weights)
        positions, next_position = encoded.positions, encoded.next_position
        if pictures:
            _place(embeds, encoded.image_rows, values)
        if pictures and TEXT_EMBEDS in values:
            place_text(embeds, is_text, values.pop(TEXT_EMBEDS), calls(pictures))
        seen = values.pop(IMAGE_POSITIONS, None)
        if pictures and seen is not None:
            counts = [count for picture in pictures for count in picture.layout.tokens]
            positions, next_position = placed_positions(
                len(embeds),
                encoded.image_rows,
                [picture.layout for picture in pictures],
                self._text.positions,
                np.split(seen[0], np.cumsum(counts)[:-1]),
                self._num_axes,
            )
        return Prompt(
            embeds=embeds,
            positions=positions,
            next_position=next_position,
            values=values,
            picture_rows=encoded.picture_rows,
            row_weights=encoded.row_weights,
        )


def _place(embeds: Array, rows: Array, values: Mapping[str, Array]) -> None:
    """Put the rows of the pictures where their placeholders stand."""
    if IMAGE_EMBEDS not in values:
        raise BundleError(f"no graph gives {IMAGE_EMBEDS!r}", hint="compile the bundle again")
    seen = values[IMAGE_EMBEDS].reshape(-1, embeds.shape[1])
    if len(seen) != len(rows):
        raise BundleError(
            f"the vision graphs gave {len(seen)} rows for {len(rows)} visual tokens",
            hint="compile the bundle again",
        )
    embeds[rows] = seen


def calls(pictures: Sequence[PreparedImage]) -> int:
    """How often the vision graph is called for some pictures."""
    return sum(len(picture.feeds) for picture in pictures)


def place_text(embeds: Array, is_text: Array, fused: Array, num_calls: int) -> None:
    """Put rows of text in their places that have seen the pictures, one after the other.

    `fused` [1, calls * Q, W] are the last Q rows of text; behind several calls they are the mean.
    """
    seen = fused.reshape(num_calls, -1, embeds.shape[1]).mean(0)
    rows = np.flatnonzero(is_text)[-len(seen) :]
    embeds[rows] = seen[len(seen) - len(rows) :]


def _open_embedding(bundle: Bundle) -> EmbeddingTable:
    """The table of the graph of role `embedding`."""
    for graph in bundle.variant.graphs:
        if graph.role == EMBEDDING:
            return open_table(bundle, graph)
    raise BundleError(
        f"variant {bundle.variant_name!r} has no graph of role {EMBEDDING!r}",
        hint="compile the bundle again",
    )
