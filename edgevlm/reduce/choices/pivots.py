"""What is least like a few pivots: tokens that others do not repeat (DART, arXiv 2502.11494).

Pivots are the rows of a picture and of the question whose keys are largest, by the sum of absolute
values over all heads, as the cache of the layer before keeps them. Each takes in turn the visual
tokens that are least like it and not yet taken; likeness is the cosine of rows behind the decoder's
last norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from edgevlm.reduce.attending import numpy_turned, turned
from edgevlm.reduce.piece import Choice, Site, StaticClass, register
from edgevlm.reduce.view import numpy_of_visual, numpy_unit, of_visual, unit

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.reduce.view import View

LAST = 1e30
"""Taken from a size or a likeness, it puts a row behind all others."""


@register
class Pivots(Choice):
    """The visual pivots themselves, and an even share of the rest for every pivot.

    Where shares are uneven the first pivots get one more: visual ones come first, large ones first
    among them. Where the question has fewer rows than pivots, the first rows of the call stand in.
    """

    name: ClassVar[str] = "pivots"
    static_class: ClassVar[StaticClass] = "S2"
    sites: ClassVar[tuple[Site, ...]] = ("decoder",)

    visual: int = Field(4, ge=1, description="Pivots among the tokens of a picture.")
    text: int = Field(4, ge=0, description="Pivots among the rows of the question.")

    @property
    def needs(self) -> frozenset[str]:
        """Keys, and which rows are the question's."""
        return frozenset({"attention", "question"})

    @property
    def asks(self) -> frozenset[str]:
        """The question."""
        return frozenset({"question"})

    @property
    def looks_back(self) -> bool:
        """At keys."""
        return True

    @property
    def looks_normed(self) -> bool:
        """At what is alike."""
        return True

    def torch(self, view: View[Tensor], scores: Tensor | None, count: int) -> Tensor:
        """A fixed number of steps, each over all pictures."""
        import torch

        from edgevlm_export.ops import take_rows, top_rows

        probe, call = view.probes["previous"], view.call
        assert call is not None, "a stage of the decoder has a call"
        assert view.normed is not None
        sizes = turned(probe, probe.k, probe.num_kv_heads).abs().sum(-1)
        of_question = sizes + LAST * ((call.weights["question"] > 0).to(sizes.dtype) - 1.0)
        rows = unit(view.normed)
        tokens = of_visual(view, rows)
        places = torch.arange(tokens.shape[1])
        visual = _largest(of_visual(view, sizes), min(self.visual, count))
        pivots = [take_rows(tokens, row, view.dense) for row in visual]
        pivots += [rows.index_select(1, row.flatten()) for row in _largest(of_question, self.text)]
        taken = torch.stack([(row == places).to(rows.dtype) for row in visual]).sum(0)
        for pivot, share in zip(pivots, _shares(count - len(visual), len(pivots)), strict=True):
            if share:
                likeness = (tokens @ pivot.mT).flatten(1)
                found, _ = top_rows(-1.0 * likeness - LAST * taken, share, view.dense)
                taken = taken + (found[:, :, None] == places).to(rows.dtype).sum(1)
        kept, _ = top_rows(taken, count, view.dense)
        return kept

    def numpy(self, view: View[np.ndarray], scores: np.ndarray | None, count: int) -> np.ndarray:
        """Pivot by pivot."""
        probe, call = view.probes["previous"], view.call
        assert call is not None, "a stage of the decoder has a call"
        assert view.normed is not None
        heads = probe.k[0].reshape(len(probe.k[0]), probe.num_kv_heads, -1)
        keys = np.stack(
            [numpy_turned(probe, heads[:, head]) for head in range(probe.num_kv_heads)], 1
        )
        sizes = np.abs(keys).sum((1, 2))
        asked = np.flatnonzero(call.weights["question"][0]).tolist()
        of_question = sorted(asked, key=lambda row: -sizes[row])[: self.text]
        of_question += range(self.text - len(of_question))
        rows = numpy_unit(view.normed[0])
        found = []
        for tokens, large in zip(
            numpy_of_visual(view, rows[None]), numpy_of_visual(view, sizes[None]), strict=True
        ):
            visual = list(np.argsort(-large, kind="stable")[: min(self.visual, count)])
            taken = list(visual)
            pivots = [*tokens[visual], *rows[of_question]]
            for pivot, share in zip(pivots, _shares(count - len(taken), len(pivots)), strict=True):
                left = [place for place in range(len(tokens)) if place not in taken]
                likeness = tokens[left] @ pivot
                taken += [left[place] for place in np.argsort(likeness, kind="stable")[:share]]
            found.append(sorted(taken))
        return np.array(found, np.int64)


def _largest(sizes: Tensor, count: int) -> list[Tensor]:
    """Rows [B, 1] of the largest of sizes [B, T], one after the other."""
    import torch

    places = torch.arange(sizes.shape[1])
    found = []
    for _ in range(count):
        found.append(sizes.argmax(1, keepdim=True))
        sizes = sizes - LAST * (places == found[-1]).to(sizes.dtype)
    return found


def _shares(total: int, count: int) -> list[int]:
    """Even shares of a total, the first of them larger by one where it does not divide."""
    return [total // count + (place < total % count) for place in range(count)]
