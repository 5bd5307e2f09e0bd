"""What text looks at: softmax attention of weighted rows of a decoder call, summed per token.

Scores are normalised over the rows of this call that the asking row sees, as attention itself is on
a first prompt. Rows that an earlier call left in the cache take no part, so that what is kept of a
picture does not depend on how a conversation was cut into calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.reduce.view import View, numpy_of_visual, of_visual

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.reduce.seq import Probe


def text_scores(
    view: View[Tensor], layer: str, query: str, rope: str, top_heads: int | None
) -> Tensor:
    """Scores [P, N]: attention to visual tokens, mean over heads and over the rows that ask."""
    import torch

    from edgevlm_export.ops import probe_attention, rotary

    probe, call = view.probes[layer], view.call
    assert call is not None, "a stage of the decoder has a call"
    q, k = probe.q, probe.k
    if rope != "off":
        assert probe.cos is not None
        assert probe.sin is not None
        q = rotary(q, probe.cos, probe.sin, probe.num_heads)
        k = rotary(k, probe.cos, probe.sin, probe.num_kv_heads)
    if query == "last":
        rows, weights = call.last, torch.ones(1, 1, 1)
    else:
        rows, weights = torch.arange(q.shape[1]), call.weights[query][:, None]
        weights = weights / weights.sum(-1, keepdim=True)
    q = q if query != "last" else q.index_select(1, rows)
    heads = probe.num_heads, probe.num_kv_heads
    if top_heads is None:
        by_head = weights * (1.0 / probe.num_heads)
    else:
        by_head = weights * _attentive_heads(view, q, k, rows, weights, top_heads)
    scores = probe_attention(q, k, by_head, *heads, probe.scale, rows)
    if rope == "corrected":
        scores = scores / _by_rotation(probe, rows, weights)
    return of_visual(view, scores)


def _attentive_heads(
    view: View[Tensor], q: Tensor, k: Tensor, rows: Tensor, weights: Tensor, count: int
) -> Tensor:
    """[1, H, 1]: 1 / count for the heads that look at visual tokens most, else 0."""
    import torch

    from edgevlm_export.ops import probe_attention, top_rows

    probe = next(iter(view.probes.values()))
    masses = []
    for head in range(probe.num_heads):
        alone = torch.zeros(1, probe.num_heads, 1)
        alone[:, head] = 1.0
        scores = probe_attention(
            q, k, weights * alone, probe.num_heads, probe.num_kv_heads, probe.scale, rows
        )
        masses.append(of_visual(view, scores).sum())
    kept, _ = top_rows(torch.stack(masses)[None], count, view.dense)
    is_kept = kept[:, :, None] == torch.arange(probe.num_heads)
    return is_kept.to(q.dtype).sum(1)[:, :, None] * (1.0 / count)


def _by_rotation(probe: Probe[Tensor], rows: Tensor, weights: Tensor) -> Tensor:
    """What the rows would give each key if queries and keys were all ones: [1, T]."""
    from edgevlm_export.ops import probe_attention, rotary

    assert probe.cos is not None
    assert probe.sin is not None
    width = probe.k.shape[2] // probe.num_kv_heads
    ones = probe.k[:, :, :width] * 0.0 + 1.0
    turned = rotary(ones, probe.cos, probe.sin, 1)
    asking = turned.index_select(1, rows)
    return probe_attention(asking, turned, weights, 1, 1, probe.scale, rows)


def numpy_text_scores(
    view: View[np.ndarray], layer: str, query: str, rope: str, top_heads: int | None
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
        per_head = per_head[np.argsort(-np.array(masses), kind="stable")[:top_heads]]
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
        q, k = _turned(probe, q), _turned(probe, k)
    return _softmax_to(q[row] @ k[: row + 1].T * probe.scale, len(k))


def _free_attention(probe: Probe[np.ndarray], row: int) -> np.ndarray:
    """The same for queries and keys of ones."""
    width = probe.k.shape[2] // probe.num_kv_heads
    ones = _turned(probe, np.ones((probe.k.shape[1], width)))
    return _softmax_to(ones[row] @ ones[: row + 1].T * probe.scale, len(ones))


def _softmax_to(logits: np.ndarray, length: int) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    found = np.zeros(length)
    found[: len(logits)] = weights / weights.sum()
    return found


def _turned(probe: Probe[np.ndarray], x: np.ndarray) -> np.ndarray:
    """Rotate rows [T, D]: feature i turns with feature i + R."""
    assert probe.cos is not None
    assert probe.sin is not None
    pairs = probe.cos.shape[1]
    cos, sin = probe.cos[: len(x)], probe.sin[: len(x)]
    first, second, rest = x[:, :pairs], x[:, pairs : 2 * pairs], x[:, 2 * pairs :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=1)
