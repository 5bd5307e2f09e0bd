"""Our own model in torch as a witness: each component fed by the reference, then one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevlm.evidence.witness import Question, Witness
from edgevlm.model.vision import grid_tables
from edgevlm.model.vlm import Vlm


@torch.inference_mode()
def eager_witness(
    model: Vlm,
    question: Question,
    parent: Witness,
    *,
    end_tokens: frozenset[int],
    max_new_tokens: int,
    lossy: bool = False,
    generates: bool = True,
) -> Witness:
    """Answer a question with our eager model, in at most so many tokens.

    The decoder runs over the prompt with the parent's visual tokens and over the parent's answer,
    so its logits [len(answer), V] belong to the same rows as the parent's. A `lossy` form answers
    from its own visual tokens, as what is made of it will. Where the best token of every row is the
    parent's, that *is* our greedy answer; else the answer is generated, or where it is not to be,
    ends with the first token that differs.
    """
    vision, projector, chained = _pictures(model, question, parent)
    logits_RV = _along(model, question, parent.projector, parent.answer)
    fed, free_RV = parent.projector, logits_RV
    if lossy and not all(map(np.array_equal, chained, parent.projector)):
        fed, free_RV = chained, _along(model, question, chained, parent.answer)
    answer = parent.answer
    best = tuple(int(token) for token in free_RV.argmax(axis=1))
    if best != parent.answer and generates:
        answer, free_RV = _greedy(model, question, fed, max_new_tokens, end_tokens)
    elif best != parent.answer:
        answer = best[: 1 + first_difference(best, parent.answer)]
        free_RV = free_RV[: len(answer)]
    return Witness(
        vision=vision,
        projector=projector,
        answer=answer,
        logits=logits_RV,
        chained=chained,
        fed=fed,
        free=None if free_RV is logits_RV else free_RV,
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Where two answers of one length part; their length where they do not."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(ours))


def positions(question: Question, num_answered: int) -> Tensor:
    """Positions [T + A] or [3, T + A] of a prompt and the first A tokens of its answer."""
    prompt = torch.from_numpy(question.prompt.positions)
    start = question.prompt.next_position
    answered = torch.arange(start, start + num_answered).expand(*prompt.shape[:-1], num_answered)
    return torch.cat([prompt, answered], dim=-1)


def pixels_of(feed: Mapping[str, NDArray[Any]]) -> Tensor:
    """Pixels of one call: [1, C, H, W], or [1, P, values], which a feed has without its axis 0."""
    pixels = torch.from_numpy(feed["pixels"])
    return pixels if pixels.ndim == 4 else pixels[None]


def _pictures(
    model: Vlm, question: Question, parent: Witness
) -> tuple[tuple[NDArray[np.float32], ...], ...]:
    """Features, visual tokens of the parent's features, and visual tokens of these."""
    vision: list[NDArray[np.float32]] = []
    projector: list[NDArray[np.float32]] = []
    chained: list[NDArray[np.float32]] = []
    for image in question.images:
        grid = image.layout.grid or model.spec.vision.grids[0]
        tables = grid_tables(model.spec.vision, grid)
        for feed in image.feeds:
            features = model.vision(pixels_of(feed), tables)
            if parent.vision:
                given = torch.from_numpy(parent.vision[len(vision)]).reshape(features.shape)
            else:
                given = features
            vision.append(features.flatten(0, -2).numpy())
            projector.append(model.projector(given, grid).flatten(0, -2).numpy())
            chained.append(model.projector(features, grid).flatten(0, -2).numpy())
    return tuple(vision), tuple(projector), tuple(chained)


def _along(
    model: Vlm, question: Question, visual: Sequence[NDArray[np.float32]], answer: tuple[int, ...]
) -> NDArray[np.float32]:
    """Logits [len(answer), V] of the rows that choose an answer."""
    rows, places = inputs_along(model, question, _tensor(visual), answer)
    num_prompt = len(question.prompt.token_ids)
    logits_RV: NDArray[np.float32] = model.answer(rows, places, num_prompt).numpy()
    return logits_RV


def inputs_along(
    model: Vlm, question: Question, visual: Tensor | None, answer: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Rows [1, T, W] of a prompt with these visual tokens and an answer, and their positions.

    The last token of an answer is chosen, and never fed.
    """
    rows = model.embed(torch.from_numpy(question.prompt.token_ids), visual)
    fed = torch.tensor(answer[:-1], dtype=torch.long)
    return torch.cat([rows, model.embedding(fed)[None]], dim=1), positions(question, len(fed))


def _greedy(
    model: Vlm,
    question: Question,
    visual: Sequence[NDArray[np.float32]],
    count: int,
    end_tokens: frozenset[int],
) -> tuple[tuple[int, ...], NDArray[np.float32]]:
    """A greedy answer, and the logits [len(answer), V] that its tokens were chosen from."""
    answer: list[int] = []
    logits: list[NDArray[np.float32]] = []
    rows, places = inputs_along(model, question, _tensor(visual), ())
    for token, logits_V in islice(model.greedy(rows, places), count):
        answer.append(token)
        logits.append(logits_V.numpy())
        if token in end_tokens:
            break
    return tuple(answer), np.stack(logits)


def _tensor(visual: Sequence[NDArray[np.float32]]) -> Tensor | None:
    """The visual tokens of all pictures, None without pictures."""
    return torch.from_numpy(np.concatenate(visual)) if visual else None
