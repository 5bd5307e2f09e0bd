"""What rows behind a picture see when some of its rows are hidden from them (VoCo-LLaMA).

A picture comes as N visual tokens and m rows that stand for it. Row j of the tokens is hidden from
every row that stands behind the m rows of its picture. For pictures that begin at rows s,

    sees(i, j) = j <= i  and not (s <= j < s + N  and  s + N + m <= i)

Text before a picture stays visible to all that follows. The rows that are hidden from what comes
need not be kept: a state takes the others, whose order and positions are what they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgevlm.model.spec import VlmSpec
from edgevlm_export.ops import CLOSED, kept_rows

__all__ = ["Hidden", "hidden_of"]

# T rows of a call, L of them that stay, P pictures of N tokens and m rows, S slots of a cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Hidden:
    """What is hidden in a call: `rows` [L] are those that stay, `closed` [1, 1, T, T] is additive.

    `closed` is 0 or CLOSED, and says nothing of rows before which a row stands.
    """

    rows: Tensor
    closed: Tensor

    def mask(self, past: Tensor) -> Tensor:
        """The mask [1, 1, T, S + T] of rows behind slots that are open as `past` [1, 1, 1, S]."""
        count = self.closed.shape[2]
        numbers = torch.arange(count)
        # A row is behind another or hidden from it, never both: no sum is below CLOSED.
        behind = (numbers > numbers[:, None]).to(self.closed.dtype) * CLOSED
        return torch.cat([past.expand(-1, -1, count, -1), self.closed + behind], -1)


def hidden_of(spec: VlmSpec, starts: Tensor, x: Tensor) -> Hidden:
    """What a model hides in a call of rows x [1, T, W] whose pictures begin at `starts` [P]."""
    tokens, end = spec.hidden, spec.entering
    numbers = torch.arange(x.shape[1])
    place = numbers - starts[:, None]
    is_visual = ((place >= 0) & (place < tokens)).to(x.dtype)
    is_behind = (place >= end).to(x.dtype)
    # A row belongs to one picture at most: the sum over pictures is 0 or 1.
    closed = is_behind.mT @ is_visual * CLOSED
    none = starts[:, None][:, :0]
    return Hidden(rows=kept_rows(none, starts, x, tokens), closed=closed[None, None])
