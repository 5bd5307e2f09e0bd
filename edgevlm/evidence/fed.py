"""What our model in torch is fed for a question: visual tokens, rows, positions, and who asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevlm.evidence.witness import Question, Witness
from edgevlm.model.stages import Asking, Pictures, token_offsets
from edgevlm.model.vlm import Vlm
from edgevlm.reduce.seq import VisSeq
from edgevlm_runtime.positions import placed_positions


@dataclass(frozen=True, kw_only=True, slots=True)
class Visual:
    """The visual tokens of a prompt: for each call of the vision graph rows [k, W].

    `offsets` [k, A] say how far they stand behind the beginning of their picture, where they do not
    follow each other; they are empty where they do. `texts` [Q, W] are the rows of text that have
    seen each picture, where they are fused, `fine` [patches, C] what tokens look at again.
    """

    rows: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...] = ()
    texts: tuple[Tensor, ...] = ()
    fine: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, witness: Witness) -> Visual:
        """What a witness holds."""
        rows, offsets, texts, fine = (
            tuple(torch.from_numpy(x) for x in part)
            for part in (witness.projector, witness.offsets, witness.texts, witness.fine)
        )
        return cls(rows=rows, offsets=offsets, texts=texts, fine=fine)


class Fed(NamedTuple):
    """Rows [1, T, W] and their positions, how many are the prompt's, and where pictures stand."""

    rows: Tensor
    positions: Tensor
    num_prompt: int
    pictures: Pictures | None


def visual_of(model: Vlm, calls: Sequence[tuple[VisSeq[Tensor], tuple[int, int]]]) -> Visual | None:
    """What calls for pictures of some grids made, None without pictures."""
    if not calls:
        return None
    rows, offsets, texts, fine = [], [], [], []
    for tokens, grid in calls:
        if tokens.text is not None:
            texts.append(tokens.text.flatten(0, -2))
        if tokens.fine is not None:
            fine.append(tokens.fine.flatten(0, -2))
        rows.append(tokens.features.flatten(0, -2))
        if model.spec.moves_positions(grid):
            offsets.append(token_offsets(model.spec, grid, tokens).flatten(0, -2))
    return Visual(rows=tuple(rows), offsets=tuple(offsets), texts=tuple(texts), fine=tuple(fine))


def arrays_of(visual: Visual | None) -> tuple[NDArray[np.float32], ...]:
    """Its rows as arrays, none without pictures."""
    return () if visual is None else tuple(x.numpy() for x in visual.rows)


def pixels_of(feed: Mapping[str, NDArray[Any]]) -> Tensor:
    """Pixels of one call: [1, C, H, W], or [1, P, values], which a feed has without its axis 0."""
    pixels = torch.from_numpy(feed["pixels"])
    return pixels if pixels.ndim == 4 else pixels[None]


def asking_of(model: Vlm, question: Question) -> Asking:
    """The text rows of a prompt, which a vision graph may be shown."""
    prompt = question.prompt
    is_text = np.ones(len(prompt.token_ids), bool)
    is_text[prompt.image_rows] = False
    rows = model.embedding(torch.from_numpy(prompt.token_ids[is_text]))[None]
    weights = {
        kind: torch.from_numpy(given[is_text])[None] for kind, given in prompt.row_weights.items()
    }
    return Asking(rows=rows, weights=weights)


def positions(
    question: Question,
    num_answered: int,
    rule: str = "sequential",
    visual: Visual | None = None,
    num_axes: int | None = None,
) -> Tensor:
    """Positions [T + A] or [axes, T + A] of a prompt and the first A tokens of its answer.

    `visual` are the prompt's visual tokens, whose positions may have moved by the bundle's rule;
    `num_axes` are those of the rotary embedding.
    """
    prompt = question.prompt
    found, start = prompt.positions, prompt.next_position
    if visual is not None and visual.offsets:
        found, start = placed_positions(
            len(prompt.token_ids),
            prompt.image_rows,
            [image.layout for image in question.images],
            rule,
            [x.numpy() for x in visual.offsets],
            num_axes,
        )
    placed = torch.from_numpy(found)
    answered = torch.arange(num_answered) + start
    return torch.cat([placed, answered.expand(*placed.shape[:-1], num_answered)], dim=-1)


def inputs_along(
    model: Vlm, question: Question, visual: Visual | None, answer: Sequence[int]
) -> Fed:
    """A prompt with these visual tokens and an answer, whose last token is chosen and never fed."""
    prompt = question.prompt
    seen = None if visual is None else torch.cat(visual.rows)
    rows = model.embed(torch.from_numpy(prompt.token_ids), seen)
    if visual is not None and visual.texts:
        is_text = torch.ones(rows.shape[1], dtype=torch.bool)
        is_text[torch.from_numpy(prompt.image_rows)] = False
        rows[0, is_text] = torch.stack(visual.texts).mean(0)
    fed = torch.tensor(answer[:-1], dtype=torch.long)
    rule, num_axes = model.spec.text.get("positions", ""), model.spec.decoder.rope.num_axes
    return Fed(
        rows=torch.cat([rows, model.embedding(fed)[None]], dim=1),
        positions=positions(question, len(fed), rule, visual, num_axes),
        num_prompt=len(prompt.token_ids),
        pictures=_pictures(question, len(fed), visual),
    )


def _pictures(question: Question, num_answered: int, visual: Visual | None) -> Pictures | None:
    """Where the pictures of a prompt stand; an answer behind it does not ask."""
    prompt = question.prompt
    if not len(prompt.picture_rows):
        return None
    none = torch.zeros(num_answered)
    weights = {
        kind: torch.cat([torch.from_numpy(given), none])[None]
        for kind, given in prompt.row_weights.items()
    }
    return Pictures(
        starts=torch.from_numpy(prompt.picture_rows),
        last=torch.tensor([len(prompt.token_ids) - 1]),
        weights=weights,
        fine=None if visual is None or not visual.fine else torch.stack(visual.fine),
    )
