"""What one form of the model says about the samples: the thing that rungs compare.

Every rung answers the same samples. Each component is fed what the rung's *parent* put out, not
what the rung's own earlier components did, so that an error counts where it arises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgevlm.samples import Sample
from edgevlm_runtime.image import ImageSpec, PreparedImage, load_image, prepare
from edgevlm_runtime.text import EncodedPrompt, TextSpec, encode_prompt

PARTS = ("vision", "projector", "chained", "fed", "offsets", "texts", "fine")
"""What a witness has one array of for each call of the vision graph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A sample after preprocessing: prepared pictures and an encoded prompt of T rows."""

    images: tuple[PreparedImage, ...]
    prompt: EncodedPrompt

    @property
    def feeds(self) -> list[Mapping[str, NDArray[np.float32] | NDArray[np.int64]]]:
        """One entry per call of the vision graph, over all pictures."""
        return [feed for image in self.images for feed in image.feeds]


@dataclass(frozen=True, kw_only=True, slots=True)
class Witness:
    """One answer to one sample, with what was seen on the way.

    `vision` and `projector` have one array per call of the vision graph: features [rows, width] and
    visual tokens [tokens, W]. `answer` is greedy; `logits` [len(answer), V] are the rows that its
    tokens were chosen from. Where the components were fed by a parent, `chained` are the visual
    tokens of its own features, which a graph of both components gives, and `fed` those that its
    decoder read, which a decoder that is to agree with it must read too, and `offsets` where these
    stand behind the beginning of their pictures, if they moved; `texts` [Q, W] are the rows of text
    that it read, if they have seen the pictures, and `fine` [patches, C] the features that its
    visual tokens looked at again. Where the logits are along a parent's answer that
    is not its own, `free` [len(answer), V] are those along its own.
    """

    vision: tuple[NDArray[np.float32], ...]
    projector: tuple[NDArray[np.float32], ...]
    answer: tuple[int, ...]
    logits: NDArray[np.float32]
    chained: tuple[NDArray[np.float32], ...] = ()
    fed: tuple[NDArray[np.float32], ...] = ()
    offsets: tuple[NDArray[np.float32], ...] = ()
    texts: tuple[NDArray[np.float32], ...] = ()
    fine: tuple[NDArray[np.float32], ...] = ()
    free: NDArray[np.float32] | None = None

    def leading(self) -> Witness:
        """The same for those that follow its answer: with the logits of that one's rows."""
        logits = self.logits[: len(self.answer)] if self.free is None else self.free
        return replace(self, logits=logits, free=None)


def ask(
    sample: Sample,
    image_spec: ImageSpec,
    text_spec: TextSpec,
    tokenizer: Tokenizer,
    num_axes: int | None = None,
) -> Question:
    """Preprocess a sample exactly as the runtime does, for a rotary embedding of so many axes."""
    images = tuple(prepare(load_image(image, image_spec), image_spec) for image in sample.images)
    prompt = encode_prompt(
        sample.messages, [image.layout for image in images], text_spec, tokenizer, num_axes
    )
    return Question(images=images, prompt=prompt)


def save(witnesses: Sequence[Witness]) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """Flatten witnesses to named arrays, for the stage cache."""
    arrays: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {}
    for i, witness in enumerate(witnesses):
        arrays[f"{i}.answer"] = np.array(witness.answer, np.int64)
        arrays[f"{i}.logits"] = witness.logits
        if witness.free is not None:
            arrays[f"{i}.free"] = witness.free
        for part in PARTS:
            for j, array in enumerate(getattr(witness, part)):
                arrays[f"{i}.{part}.{j}"] = array
    return arrays


def load(arrays: Mapping[str, NDArray[np.float32]]) -> list[Witness]:
    """Rebuild what `save` flattened."""
    count = 1 + max((int(name.split(".")[0]) for name in arrays), default=-1)

    def parts(i: int, part: str) -> tuple[NDArray[np.float32], ...]:
        number = sum(name.startswith(f"{i}.{part}.") for name in arrays)
        return tuple(arrays[f"{i}.{part}.{j}"] for j in range(number))

    return [
        Witness(
            vision=parts(i, "vision"),
            projector=parts(i, "projector"),
            chained=parts(i, "chained"),
            fed=parts(i, "fed"),
            offsets=parts(i, "offsets"),
            texts=parts(i, "texts"),
            fine=parts(i, "fine"),
            answer=tuple(int(token) for token in arrays[f"{i}.answer"]),
            logits=arrays[f"{i}.logits"],
            free=arrays.get(f"{i}.free"),
        )
        for i in range(count)
    ]
