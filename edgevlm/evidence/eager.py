"""Our own model in torch as a witness: each component fed by the reference, then one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from edgevlm.evidence.fed import Visual, arrays_of, asking_of, inputs_along, pixels_of, visual_of
from edgevlm.evidence.witness import Question, Witness
from edgevlm.model.vision import grid_tables
from edgevlm.model.vlm import Vlm
from edgevlm.reduce.seq import replaced

Arrays = tuple[NDArray[np.float32], ...]


@torch.inference_mode()
def eager_witness(
    model: Vlm,
    question: Question,
    parent: Witness,
    *,
    end_tokens: frozenset[int],
    max_new_tokens: int,
    lossy: bool = False,
    reduces: bool = False,
    generates: bool = True,
) -> Witness:
    """Answer a question with our eager model, in at most so many tokens.

    The decoder runs over the prompt with the parent's visual tokens and over the parent's answer,
    so its logits [len(answer), V] belong to the same rows as the parent's. A `lossy` form answers
    from its own visual tokens, as what is made of it will; one that `reduces` has fewer of them
    than its parent, whose it does not see. Where the best token of every row is the parent's, that
    *is* our greedy answer; else the answer is generated, or where it is not to be, ends with the
    first token that differs.
    """
    vision, projector, own = _pictures(model, question, parent, reduces=reduces)
    chained = arrays_of(own)
    given = own if reduces or own is None else Visual.of(parent)
    logits_RV = _along(model, question, given, parent.answer)
    fed, free_RV = given, logits_RV
    if lossy and given is not own and not all(map(np.array_equal, chained, parent.projector)):
        fed, free_RV = own, _along(model, question, own, parent.answer)
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
        fed=arrays_of(fed),
        offsets=() if fed is None else tuple(x.numpy() for x in fed.offsets),
        texts=() if fed is None else tuple(x.numpy() for x in fed.texts),
        fine=() if fed is None else tuple(x.numpy() for x in fed.fine),
        free=None if free_RV is logits_RV else free_RV,
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Where two answers of one length part; their length where they do not."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(ours))


def _pictures(
    model: Vlm, question: Question, parent: Witness, *, reduces: bool
) -> tuple[Arrays, Arrays, Visual | None]:
    """Features, visual tokens of the parent's features, and visual tokens of these."""
    vision: list[NDArray[np.float32]] = []
    projector: list[NDArray[np.float32]] = []
    chained = []
    asking = asking_of(model, question)
    for image in question.images:
        grid = image.layout.grid or model.spec.vision.grids[0]
        tables = grid_tables(model.spec.vision, grid)
        for feed in image.feeds:
            seen = model.vision(pixels_of(feed), tables, grid)
            chained.append((model.project(seen, grid, asking), grid))
            features = seen.tokens.features
            vision.append(features.flatten(0, -2).numpy())
            given = seen
            if parent.vision and not reduces:
                theirs = torch.from_numpy(parent.vision[len(vision) - 1]).reshape(features.shape)
                given = replace(seen, tokens=replaced(seen.tokens, theirs))
            projector.append(model.project(given, grid, asking).features.flatten(0, -2).numpy())
    return tuple(vision), tuple(projector), visual_of(model, chained)


def _along(
    model: Vlm, question: Question, visual: Visual | None, answer: tuple[int, ...]
) -> NDArray[np.float32]:
    """Logits [len(answer), V] of the rows that choose an answer."""
    fed = inputs_along(model, question, visual, answer)
    logits_RV: NDArray[np.float32] = model.answer(*fed).numpy()
    return logits_RV


def _greedy(
    model: Vlm,
    question: Question,
    visual: Visual | None,
    count: int,
    end_tokens: frozenset[int],
) -> tuple[tuple[int, ...], NDArray[np.float32]]:
    """A greedy answer, and the logits [len(answer), V] that its tokens were chosen from."""
    answer: list[int] = []
    logits: list[NDArray[np.float32]] = []
    fed = inputs_along(model, question, visual, ())
    for token, logits_V in islice(model.greedy(fed.rows, fed.positions, fed.pictures), count):
        answer.append(token)
        logits.append(logits_V.numpy())
        if token in end_tokens:
            break
    return tuple(answer), np.stack(logits)
