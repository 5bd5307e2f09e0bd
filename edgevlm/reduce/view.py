"""What a piece may look at: the tokens, and where they come from; with the sums that pieces share.

A view holds torch tensors, or numpy arrays for the twins. In the encoder each of B groups is a
batch entry of its own; in the decoder all P groups are rows of one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic

import numpy as np

from edgevlm.reduce.seq import ArrayT, Probe, VisSeq

if TYPE_CHECKING:
    from torch import Tensor

# B groups, N tokens of each, T rows of a call, P groups in it, Q rows of text, m probe rows

QUERIES = ("last", "text", "question", "words", "raters")
"""Rows of text that may ask: the last, all, those behind the pictures, of these the words that
mean something, and of these the ones that look at the pictures most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[ArrayT]):
    """The rows of a decoder call, among which the visual tokens stand.

    `rows` [1, T, W] enter the layer. Group p begins at row `starts[p]`, [P] int64. `last` [1] is
    the last row of the prompt. `weights` [1, T] by kind are how much each row asks.
    """

    rows: ArrayT
    starts: ArrayT
    last: ArrayT
    weights: Mapping[str, ArrayT] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class View(Generic[ArrayT]):
    """The tokens of a stage and what stands around them.

    `probes` are queries and keys: of encoder layers by their number as the piece wrote it, of a
    decoder's layer by `own` and `previous`. `encoded` [B, M, Dv] are the encoder's features, where
    tokens are rows of the projector; `squares` [N, m] are the features that each was made of.
    `question` [1, Q, W] and `asked` [1, Q] by kind are the text rows and their weights. `normed`
    [1, T, W] are the rows of a decoder call behind the decoder's last norm, where a piece looks at
    them. `registers` [B, M, Dv] are what learned rows beside the patches became in the encoder.
    `learned` are the weights of pieces that have some, by the names of both. `dense` asks for
    forms without TopK and Gather.
    """

    tokens: VisSeq[ArrayT]
    probes: Mapping[int | str, Probe[ArrayT]] = field(default_factory=dict)
    encoded: ArrayT | None = None
    squares: ArrayT | None = None
    question: ArrayT | None = None
    asked: Mapping[str, ArrayT] = field(default_factory=dict)
    call: Call[ArrayT] | None = None
    normed: ArrayT | None = None
    registers: ArrayT | None = None
    learned: Mapping[str, Mapping[str, ArrayT]] = field(default_factory=dict)
    dense: bool = False

    def text(self, query: str) -> tuple[ArrayT, ArrayT]:
        """Rows [1, Q, W] among which those of some weight [1, Q] are the text that asks."""
        if self.call is not None:
            return self.call.rows, self.call.weights[query]
        assert self.question is not None, "a stage that looks at the question is shown it"
        return self.question, self.asked[query]


def unit(x: Tensor) -> Tensor:
    """Rows of length one; a row of zeros stays one."""
    found: Tensor = x / ((x * x).sum(-1, keepdim=True) + 1e-12).sqrt()
    return found


def numpy_unit(x: np.ndarray) -> np.ndarray:
    """The twin of `unit`."""
    found: np.ndarray = x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-12)
    return found


def picked(values: Tensor, rows: Tensor, *, dense: bool = False) -> Tensor:
    """Of whole numbers [B, N] those at rows [B, k]; they travel as float32, exact below 2 ** 24."""
    import torch

    from edgevlm_export.ops import take_rows

    found = take_rows(values[..., None].to(torch.float32), rows, dense)
    return found.flatten(1).to(values.dtype)


def ranked(scores: Tensor) -> Tensor:
    """The place [B, N] of each row in descending order of scores, ties in order of rows."""
    import torch

    ours, others = scores[:, :, None], scores[:, None]
    rows = torch.arange(scores.shape[1])
    is_earlier = rows[:, None] > rows
    return ((others > ours) | ((others == ours) & is_earlier)).sum(-1)


def nearest(likeness: Tensor, count: int, *, dense: bool = False) -> Tensor:
    """Ones [B, M, N] at the `count` largest of each row of likeness [B, M, N], else zeros."""
    import torch

    from edgevlm_export.ops import top_rows

    num_rows, num_tokens = likeness.shape[1:]
    rows, _ = top_rows(likeness.flatten(0, 1), count, dense)
    is_near = (rows[:, :, None] == torch.arange(num_tokens)).to(likeness.dtype).sum(1)
    found: Tensor = is_near.unflatten(0, (-1, num_rows))
    return found


def sizes_of(tokens: VisSeq[Tensor]) -> Tensor:
    """What each token was merged from [B, N, 1], ones where nothing was."""
    if tokens.sizes is not None:
        return tokens.sizes[..., None]
    return tokens.features[..., :1] * 0.0 + 1.0


def numpy_sizes_of(tokens: VisSeq[np.ndarray]) -> np.ndarray:
    """The twin of `sizes_of`, [B, N]."""
    return np.ones(tokens.places.shape) if tokens.sizes is None else tokens.sizes


def mean_keys(probe: Probe[Tensor], rows: Tensor) -> Tensor:
    """Keys [B, N, D] of these rows [B, N, Hkv * D], the mean over heads."""
    heads: Tensor = rows.unflatten(-1, (probe.num_kv_heads, -1))
    return heads.mean(-2)


def numpy_mean_keys(probe: Probe[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """The twin of `mean_keys`."""
    heads = rows.reshape(*rows.shape[:2], probe.num_kv_heads, -1)
    found: np.ndarray = heads.mean(2)
    return found


def patches(view: View[Tensor], probe: Probe[Tensor], values: Tensor) -> Tensor:
    """Of values [B, T, ...] of an encoder layer's rows those of the tokens, [B, N, ...].

    Where a token was made of several patches it has their mean.
    """
    if probe.order is not None:
        values = values.index_select(1, probe.order)
    values = values[:, probe.first :]
    if view.squares is None:
        return values
    count, size = view.squares.shape
    numbers = view.squares.flatten()
    if view.dense:
        from edgevlm_export.ops import take_rows

        rows, is_line = numbers.expand(values.shape[0], -1), values.dim() == 2
        found = take_rows(values[..., None] if is_line else values, rows, True)
        found = found.flatten(1) if is_line else found
    else:
        found = values.index_select(1, numbers)
    squares: Tensor = found.unflatten(1, (count, size))
    return squares.mean(2)


def numpy_patches(
    view: View[np.ndarray], probe: Probe[np.ndarray], values: np.ndarray
) -> np.ndarray:
    """The twin of `patches`."""
    if probe.order is not None:
        values = values[:, probe.order]
    values = values[:, probe.first :]
    if view.squares is None:
        return values
    found: np.ndarray = values[:, view.squares].mean(2)
    return found


def visual_rows(view: View[Tensor]) -> Tensor:
    """Rows [P, N] of a decoder call where the visual tokens stand."""
    import torch

    assert view.call is not None, "a stage of the decoder has a call"
    count = view.tokens.features.shape[1]
    return view.call.starts[:, None] + torch.arange(count)


def numpy_visual_rows(view: View[np.ndarray]) -> np.ndarray:
    """The twin of `visual_rows`."""
    assert view.call is not None, "a stage of the decoder has a call"
    found: np.ndarray = view.call.starts[:, None] + np.arange(view.tokens.features.shape[1])
    return found


def of_visual(view: View[Tensor], values: Tensor) -> Tensor:
    """Of values [1, T, ...] of a decoder call those of the visual tokens, [P, N, ...]."""
    rows = visual_rows(view)
    picked: Tensor = values[0].index_select(0, rows.flatten())
    found: Tensor = picked.unflatten(0, rows.shape)
    return found


def numpy_of_visual(view: View[np.ndarray], values: np.ndarray) -> np.ndarray:
    """The twin of `of_visual`."""
    found: np.ndarray = values[0][numpy_visual_rows(view)]
    return found
