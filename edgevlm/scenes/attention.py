"""Attention for training on a CPU: plain matrix products with a short backward pass.

PyTorch's fused attention runs its backward pass on a CPU at a twentieth of the speed of the matrix
products in it, and the backward pass of `softmax` is almost as slow. Here the probabilities are
kept, and the backward pass uses the identity of FlashAttention (Dao et al., 2022): the row sum of
probability times its gradient is the row sum of output times its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# B batch, H query heads, G key-value heads, P prefix, R rows, W row width, D head size


class _Attend(torch.autograd.Function):
    """softmax(q k^T + mask) v over (N, rows, D), scaled queries."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        scores = query @ key.transpose(-1, -2)
        if mask is not None:
            scores += mask
        weights = scores.softmax(-1)
        out = weights @ value
        ctx.save_for_backward(query, key, value, weights, out)
        return out

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        (grad,) = grads
        query, key, value, weights, out = ctx.saved_tensors
        grad_value = weights.transpose(-1, -2) @ grad
        grad_scores = grad @ value.transpose(-1, -2)
        grad_scores -= (grad * out).sum(-1, keepdim=True)
        grad_scores *= weights
        return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, grad_value, None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(query key^T + mask) value over the last two axes, for queries already scaled."""
    out: torch.Tensor = _Attend.apply(query, key, value, mask)  # type: ignore[no-untyped-call]
    return out


def attend_fully(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Every position sees every other: the vision encoder, by transformers' calling convention."""
    batch, heads, length, size = query.shape
    folded = (batch * heads, length, size)
    out = attend((query * scaling).reshape(folded), key.reshape(folded), value.reshape(folded))
    return out.view(batch, heads, length, size).transpose(1, 2).contiguous(), None


@dataclass(frozen=True, slots=True)
class PackedMask:
    """Additive masks: `prefix` is (P, P), `rows` (B, R, W, P + W) over the prefix and the row."""

    prefix: torch.Tensor
    rows: torch.Tensor


def packed_mask(segments_BRW: torch.Tensor, num_prefix: int, dtype: torch.dtype) -> PackedMask:
    """Every segment sees the whole prefix and, causally, itself; padding sees only the prefix.

    `segments_BRW` numbers the segment of every position, -1 for padding.
    """
    least = torch.finfo(dtype).min
    host = segments_BRW.device
    prefix_PP = torch.full((num_prefix, num_prefix), least, dtype=dtype, device=host).triu(1)
    batch, rows, width = segments_BRW.shape
    same = segments_BRW[..., :, None] == segments_BRW[..., None, :]
    causal = torch.ones(width, width, dtype=torch.bool, device=host).tril()
    rows_BRWK = torch.zeros(batch, rows, width, num_prefix + width, dtype=dtype, device=host)
    rows_BRWK[..., num_prefix:].masked_fill_(~(same & causal), least)
    return PackedMask(prefix_PP, rows_BRWK)


def attend_packed(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: PackedMask,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a prefix and rows of segments, by transformers' calling convention."""
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    share = heads // groups
    prefix = attention_mask.prefix.shape[0]
    rows, width = attention_mask.rows.shape[1:3]
    query = (query * scaling).view(batch, groups, share, length, size)
    prefix_key, prefix_value = key[:, :, :prefix], value[:, :, :prefix]
    head = attend(
        query[..., :prefix, :].reshape(batch, groups, share * prefix, size),
        prefix_key,
        prefix_value,
        attention_mask.prefix.repeat(share, 1),
    ).view(batch, heads, prefix, size)

    def with_prefix(states: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        before = states[:, :, None].expand(-1, -1, rows, -1, -1)
        return torch.cat((before, own.reshape(batch, groups, rows, width, size)), dim=3)

    tail = attend(
        query[..., prefix:, :]
        .reshape(batch, groups, share, rows, width, size)
        .transpose(2, 3)
        .reshape(batch, groups, rows, share * width, size),
        with_prefix(prefix_key, key[:, :, prefix:]),
        with_prefix(prefix_value, value[:, :, prefix:]),
        attention_mask.rows.repeat(1, 1, share, 1)[:, None],
    )
    tail = (
        tail.view(batch, groups, rows, share, width, size)
        .transpose(2, 3)
        .reshape(batch, heads, rows * width, size)
    )
    return torch.cat((head, tail), dim=2).transpose(1, 2).contiguous(), None
