"""Stages in layers of the decoder that some visual tokens skip (Mixture-of-Depths).

All tokens come to such a layer. A choice says which of them pass it, at the positions they have;
the others leave it at their places, so that the next layer chooses among all of them anew. Text
passes every layer, and the cache of a layer holds what passed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgevlm.model.spec import VlmSpec
from edgevlm.model.stages import DeepModule, with_tokens
from edgevlm.reduce.apply import chosen_rows
from edgevlm.reduce.view import Call, View
from edgevlm_export.ops import kept_rows

__all__ = ["Passing", "SkipModule", "skip_modules", "with_passed"]

# T rows of a call, L of them that pass, P pictures of N tokens, W width


@dataclass(frozen=True, kw_only=True, slots=True)
class Passing:
    """What a layer does with the rows of a call.

    `rows` [L] are those that pass, ascending, None for all. `attention` and `mlp` [1, L, 1] are how
    much they get of what these add, None for all of it. `skipped` [1, T, W] are the rows as they
    leave the layer where they skip it.
    """

    rows: Tensor | None
    attention: Tensor | None
    mlp: Tensor | None
    skipped: Tensor


class SkipModule(DeepModule):
    """A stage in a layer of the decoder, which some visual tokens skip."""

    def forward(self, view: View[Tensor]) -> Passing:
        """Which rows pass, and how all are weighed."""
        stage, call = self.stage, view.call
        assert call is not None
        assert stage.score is not None
        assert stage.skip is not None
        view = self.taught(view)
        rows = None
        if stage.count_out == stage.count_in:
            scores = stage.score.torch(replace(view, dense=stage.dense))
        else:
            found, kept = chosen_rows(stage, view)
            assert found is not None
            scores, rows = found, kept_rows(kept, call.starts, call.rows, stage.count_in)
        weighing = stage.skip.torch(scores)
        # What is weighed alike is so by one tensor.
        given = {id(x): x for x in (weighing.attention, weighing.mlp, weighing.skipped)}
        lines = {key: _line(call, weights) for key, weights in given.items() if weights is not None}
        attention, mlp = (
            line if line is None or rows is None else line.index_select(1, rows)
            for line in (lines.get(id(weighing.attention)), lines.get(id(weighing.mlp)))
        )
        weights, x = lines.get(id(weighing.skipped)), call.rows
        return Passing(
            rows=rows,
            attention=attention,
            mlp=mlp,
            skipped=x if weights is None else x * weights,
        )


def _line(call: Call[Tensor], weights: Tensor) -> Tensor:
    """Weights [P, N] of tokens as those of all rows [1, T, 1]; text has ones."""
    ones = call.rows[..., :1] * 0.0 + 1.0
    return with_tokens(ones, call.starts, weights[..., None])


def with_passed(x: Tensor, rows: Tensor, passed: Tensor) -> Tensor:
    """Rows x [1, T, W] with passed [1, L, W] in place of those of `rows` [L], which ascend."""
    numbers = torch.arange(x.shape[1])[:, None]
    is_passed = (numbers == rows).sum(-1) > 0
    # All that passed lie before all rows, in their order.
    of_passed = (numbers >= rows).sum(-1) - 1
    found = torch.where(is_passed, of_passed, numbers.flatten() + rows.shape[0])
    return torch.cat([passed[0], x[0]]).index_select(0, found)[None]


def skip_modules(spec: VlmSpec) -> nn.ModuleList:
    """The stages in layers of the decoder that tokens skip."""
    skips = () if spec.reduction is None else spec.reduction.skips
    return nn.ModuleList(SkipModule(stage, spec) for stage in skips)
