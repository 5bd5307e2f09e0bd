"""Layers before the decoder that see all of a picture, what is left of it, and the text."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edgevlm.model.attention import AttentionCore, unpacked
from edgevlm.model.layers import Layer
from edgevlm.model.spec import VlmSpec
from edgevlm.reduce.fusion import FusionOptions
from edgevlm.reduce.learned import Weight, drawn
from edgevlm_export.ops import attention, rotary, take_rows

NEVER = -1e9
"""A likeness that softmax makes nothing of."""

# N pictures of M visual tokens, k that are left, Q rows of text, T of all


class Fused(NamedTuple):
    """The tokens that are left [N, k, W], and the text [N, Q, W]."""

    tokens: Tensor
    text: Tensor


class VisibleRows:
    """Rows turn with their positions, and see those up to themselves that a mask leaves open."""

    def __init__(self, tables: tuple[Tensor, Tensor], mask: Tensor) -> None:
        """Hold cosines and sines [T, R], and the additive mask [1, 1, T, T]."""
        self.tables, self.mask = tables, mask

    def attend(self, core: AttentionCore, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attend from [N, T, H*D]."""
        spec = core.spec
        q, k, v = unpacked(spec, q, k, v)
        q = rotary(q, *self.tables, spec.num_heads)
        k = rotary(k, *self.tables, spec.num_kv_heads)
        return attention(q, k, v, spec.num_heads, spec.num_kv_heads, spec.scale, mask=self.mask)


class Fusion(nn.Module):
    """A few layers of the decoder's kind, with weights of their own."""

    def __init__(self, spec: VlmSpec, options: FusionOptions) -> None:
        """Make the layers as training begins with them."""
        super().__init__()
        first = spec.decoder.layers[0]
        plain = replace(first, attention=replace(first.attention, kv=None, window=None))
        self.rope, self.num_rows = spec.decoder.rope, options.rows
        self.dense = spec.reduction is not None and spec.reduction.dense
        self.layers = nn.ModuleList(Layer(spec.decoder.width, plain) for _ in range(options.layers))
        for name, weight in list(self.named_parameters()):
            _begin(self, name, weight)

    def forward(self, whole: Tensor, left: Tensor, text: Tensor, weights: Tensor) -> Fused:
        """What becomes of `left` [N, k, W] and `text` [1, Q, W] that saw `whole` [N, M, W].

        Rows of text of weight [1, Q] 0 fill up a graph: nobody sees them, and they stay.
        """
        fused = text[:, -self.num_rows :]
        is_text = (weights[:, -self.num_rows :] > 0).to(text.dtype)
        num_pictures, num_seen = whole.shape[0], whole.shape[1] + left.shape[1]
        x = torch.cat([whole, left, fused.expand(num_pictures, -1, -1)], 1)
        source = self._source(num_seen, is_text)
        for layer in self.layers:
            x = layer(x, source)
        found = x[:, num_seen:]
        # What fills up is no text, and stays what it was.
        found = fused + (found - fused) * is_text[..., None]
        before = text[:, : -self.num_rows].expand(num_pictures, -1, -1)
        if text.shape[1] > self.num_rows:
            found = torch.cat([before, found], 1)
        return Fused(tokens=x[:, whole.shape[1] : num_seen], text=found)

    def _source(self, num_seen: int, is_text: Tensor) -> VisibleRows:
        """Text counts on from the visual rows, whatever fills up between."""
        num_text = is_text.shape[1]
        rows = num_seen + num_text
        counted = is_text @ torch.from_numpy(np.triu(np.ones((num_text, num_text), np.float32)))
        places = (counted + (num_seen - 1.0)).to(torch.int64)
        tables = [
            torch.cat([table[0, :num_seen], take_rows(table, places, self.dense).flatten(0, 1)])
            for table in self._tables(rows)
        ]
        closed = np.triu(np.full((1, 1, rows, rows), NEVER, np.float32), 1)
        hidden = torch.cat([is_text[:, :1].expand(-1, num_seen) * 0.0, (1.0 - is_text) * NEVER], 1)
        mask = torch.from_numpy(closed) + hidden[:, None, None]
        return VisibleRows((tables[0], tables[1]), mask)

    def _tables(self, rows: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, T, R] of places from 0, which are constants of a graph."""
        turns = np.arange(rows, dtype=np.float32)[:, None] * np.array(
            self.rope.inv_freq, np.float32
        )
        scaling = np.float32(self.rope.attention_scaling)
        cos, sin = np.cos(turns) * scaling, np.sin(turns) * scaling
        return torch.from_numpy(cos)[None], torch.from_numpy(sin)[None]


def _begin(module: Fusion, name: str, weight: Tensor) -> None:
    """Give a weight what training begins with: norms of ones, matrices of normal numbers."""
    owner, _, kind = name.rpartition(".")
    shape = tuple(weight.shape)
    if weight.dim() == 2:
        # A matrix [out, in] sums over its columns.
        begun = Weight(shape=shape, deviation=shape[1] ** -0.5)
    else:
        begun = Weight(shape=shape, start="ones" if kind == "weight" else "zeros")
    value = torch.from_numpy(drawn(f"fusion.{name}", begun)).to(weight.device)
    setattr(module.get_submodule(owner), kind, nn.Parameter(value, requires_grad=False))
