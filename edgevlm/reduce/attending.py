"""What text looks at: softmax attention of weighted rows of a decoder call, summed per token.

Scores are normalised over the rows of this call that the asking row sees, as attention itself is on
a first prompt. Rows that an earlier call left in the cache take no part, so that what is kept of a
picture does not depend on how a conversation was cut into calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.reduce.view import View, numpy_of_visual, numpy_unit, of_visual, unit

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.reduce.seq import Probe


def text_scores(
    view: View[Tensor],
    layer: str,
    query: str,
    rope: str = "on",
    top_heads: int | float | None = None,
) -> Tensor:
    """Scores [P, N]: attention to visual tokens, mean over heads and over the rows that ask."""
    import torch

    from edgevlm_export.ops import probe_attention, probe_heads

    probe, call = view.probes[layer], view.call
    assert call is not None, "a stage of the decoder has a call"
    heads = probe.num_heads, probe.num_kv_heads
    q, k = probe.q, probe.k
    if rope != "off":
        q, k = turned(probe, q, heads[0]), turned(probe, k, heads[1])
    if query == "last":
        rows, weights = call.last, torch.ones(1, 1, 1)
        q = q.index_select(1, rows)
    else:
        rows, weights = torch.arange(q.shape[1]), call.weights[query][:, None]
        weights = weights / weights.sum(-1, keepdim=True)
    if top_heads is None:
        even = weights * (1.0 / probe.num_heads)
        scores = of_visual(view, probe_attention(q, k, even, *heads, probe.scale, rows))
    else:
        by_head = probe_heads(q, k, weights, *heads, probe.scale, rows)
        count = head_count(top_heads, probe.num_heads)
        scores = _of_best_heads(view, of_visual(view, by_head.mT), count)
    if rope == "corrected":
        scores = scores / of_visual(view, _by_rotation(probe, rows, weights))
    return scores


def head_count(top_heads: int | float, num_heads: int) -> int:
    """How many of the heads count, of a number or a share of them."""
    if isinstance(top_heads, int):
        return top_heads
    return max(1, round(top_heads * num_heads))


def _of_best_heads(view: View[Tensor], scores: Tensor, count: int) -> Tensor:
    """Of scores [P, N, H] the mean of the heads that look at the pictures most, all together."""
    import torch

    from edgevlm_export.ops import top_rows

    kept, _ = top_rows(scores.sum((0, 1))[None], count, view.dense)
    is_kept = (kept[:, :, None] == torch.arange(scores.shape[2])).to(scores.dtype).sum(1)
    return (scores * is_kept).sum(-1) / count


def _by_rotation(probe: Probe[Tensor], rows: Tensor, weights: Tensor) -> Tensor:
    """What the rows would give each key if queries and keys were all ones: [1, T]."""
    from edgevlm_export.ops import probe_attention

    width = probe.k.shape[2] // probe.num_kv_heads
    ones = turned(probe, probe.k[:, :, :width] * 0.0 + 1.0, 1)
    asking = ones.index_select(1, rows)
    return probe_attention(asking, ones, weights, 1, 1, probe.scale, rows)


def turned(probe: Probe[Tensor], rows: Tensor, num_heads: int) -> Tensor:
    """Queries or keys [1, T, H * D] of a decoder call, with the rotation of their positions."""
    from edgevlm_export.ops import rotary

    assert probe.cos is not None
    assert probe.sin is not None
    return rotary(rows, probe.cos, probe.sin, num_heads)


def question_likeness(view: View[Tensor], query: str) -> Tensor:
    """Cosine [P, N] of visual tokens with the mean of the rows that ask."""
    call = view.call
    assert call is not None, "a stage of the decoder has a call"
    weights = call.weights[query]
    mean = (weights / weights.sum(-1, keepdim=True)) @ call.rows[0]
    likeness: Tensor = unit(view.tokens.features) @ unit(mean)[0]
    return likeness


def numpy_question_likeness(view: View[np.ndarray], query: str) -> np.ndarray:
    """The twin of `question_likeness`."""
    call = view.call
    assert call is not None, "a stage of the decoder has a call"
    mean = np.average(call.rows[0], axis=0, weights=call.weights[query][0])
    likeness: np.ndarray = numpy_unit(view.tokens.features) @ numpy_unit(mean)
    return likeness


def numpy_text_scores(
    view: View[np.ndarray],
    layer: str,
    query: str,
    rope: str = "on",
    top_heads: int | float | None = None,
) -> np.ndarray:
    """The twin of `text_scores`, head by head and row by row."""
    probe, call = view.probes[layer], view.call
    assert call is not None, "a stage of the decoder has a call"
    asking = _asking(call.last, call.weights, query)
    is_turned = rope != "off"
    per_head = np.stack(
        [
            sum(
                weight * _row_attention(probe, head, row, is_turned=is_turned)
                for row, weight in asking.items()
            )
            for head in range(probe.num_heads)
        ]
    )
    if top_heads is not None:
        masses = [numpy_of_visual(view, values[None]).sum() for values in per_head]
        count = head_count(top_heads, probe.num_heads)
        per_head = per_head[np.argsort(-np.array(masses), kind="stable")[:count]]
    scores = per_head.mean(0)
    if rope == "corrected":
        free = sum(weight * _free_attention(probe, row) for row, weight in asking.items())
        scores = scores / np.where(np.asarray(free) > 0, free, 1.0)
    return numpy_of_visual(view, scores[None])


def _asking(last: np.ndarray, weights: Mapping[str, np.ndarray], query: str) -> dict[int, float]:
    """The rows that ask, with their shares."""
    if query == "last":
        return {int(last[0]): 1.0}
    given = weights[query][0]
    return {int(row): float(given[row] / given.sum()) for row in np.flatnonzero(given)}


def _row_attention(probe: Probe[np.ndarray], head: int, row: int, *, is_turned: bool) -> np.ndarray:
    """Softmax attention [T] of one row and head, zero for the rows behind it."""
    kv_head = head // (probe.num_heads // probe.num_kv_heads)
    q = probe.q[0].reshape(len(probe.q[0]), probe.num_heads, -1)[:, head].astype(np.float64)
    k = probe.k[0].reshape(len(probe.k[0]), probe.num_kv_heads, -1)[:, kv_head].astype(np.float64)
    if is_turned:
        q, k = numpy_turned(probe, q), numpy_turned(probe, k)
    return _softmax_to(q[row] @ k[: row + 1].T * probe.scale, len(k))


def _free_attention(probe: Probe[np.ndarray], row: int) -> np.ndarray:
    """The same for queries and keys of ones."""
    width = probe.k.shape[2] // probe.num_kv_heads
    ones = numpy_turned(probe, np.ones((probe.k.shape[1], width)))
    return _softmax_to(ones[row] @ ones[: row + 1].T * probe.scale, len(ones))


def _softmax_to(logits: np.ndarray, length: int) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    found = np.zeros(length)
    found[: len(logits)] = weights / weights.sum()
    return found


def numpy_turned(probe: Probe[np.ndarray], x: np.ndarray) -> np.ndarray:
    """Rotate rows [T, D] of one head: feature i turns with feature i + R."""
    assert probe.cos is not None
    assert probe.sin is not None
    pairs = probe.cos.shape[1]
    cos, sin = probe.cos[: len(x)], probe.sin[: len(x)]
    first, second, rest = x[:, :pairs], x[:, pairs : 2 * pairs], x[:, 2 * pairs :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=1)
