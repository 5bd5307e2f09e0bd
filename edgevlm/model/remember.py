"""Between layers of the decoder: visual tokens that look at their windows of patches again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgevlm.model.norms import LayerNorm
from edgevlm.model.spec import VlmSpec
from edgevlm.reduce.learned import Weight, drawn
from edgevlm.reduce.plan import Grid
from edgevlm.reduce.remembering import window

EPSILON = 1e-5

# P pictures of k tokens, each of s patches with C features; W width, H heads


class Remember(nn.Module):
    """One attention of every token to its own patches, times a gate."""

    def __init__(self, spec: VlmSpec, layer: int) -> None:
        """Make weights as training begins with them, for what stands before a decoder layer."""
        super().__init__()
        reduction = spec.reduction
        assert reduction is not None
        assert reduction.remember is not None
        width, features = spec.decoder.width, spec.remembered_width
        _, (height, across) = window(spec, spec.vision.grids[0])
        self.heads, self.patches = reduction.remember.heads, height * across
        self.norm, self.feature_norm = LayerNorm(width, EPSILON), LayerNorm(features, EPSILON)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(features, width, bias=False)
        self.v = nn.Linear(features, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1), requires_grad=False)
        for name in ("q", "k", "v", "out"):
            linear = self.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            rows, columns = linear.weight.shape
            begun = Weight(shape=(rows, columns), deviation=columns**-0.5)
            value = torch.from_numpy(drawn(f"remember.{layer}.{name}", begun))
            linear.weight = nn.Parameter(value.to(linear.weight.device), requires_grad=False)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Tokens [P, k, W] that have seen features [P, k * s, C] of their patches again."""
        q = self.q(self.norm(tokens)).flatten(0, 1).unflatten(-1, (self.heads, -1))
        seen = self.feature_norm(features)
        k, v = (self._by_token(linear(seen)) for linear in (self.k, self.v))
        # Every token is a batch of its own: one query, and the keys of its window.
        likeness = k.transpose(1, 2) @ (q * q.shape[-1] ** -0.5).unsqueeze(-1)
        mixed = (likeness.transpose(2, 3).softmax(-1) @ v.transpose(1, 2)).flatten(1)
        found = self.out(mixed).unflatten(0, (-1, tokens.shape[1]))
        remembered: Tensor = tokens + self.gate * found
        return remembered

    def _by_token(self, rows: Tensor) -> Tensor:
        """Rows [P, k * s, W] as the patches of each token, by heads: [P * k, s, H, W / H]."""
        tokens = rows.unflatten(1, (-1, self.patches)).flatten(0, 1)
        heads: Tensor = tokens.unflatten(-1, (self.heads, -1))
        return heads


def by_windows(features: Tensor, grid: Grid, tokens: Grid) -> Tensor:
    """Features [N, patches, C] in raster order, window by window: [N, patches, C]."""
    height, width = grid[0] // tokens[0], grid[1] // tokens[1]
    cells = features.unflatten(1, (tokens[0], height, tokens[1], width))
    found: Tensor = cells.transpose(2, 3).flatten(1, 4)
    return found


def remember_modules(spec: VlmSpec) -> nn.ModuleDict:
    """What stands before layers of the decoder, by their numbers."""
    remember = None if spec.reduction is None else spec.reduction.remember
    if remember is None:
        return nn.ModuleDict()
    layers = remember.decoder_layers(len(spec.decoder.layers))
    return nn.ModuleDict({str(layer): Remember(spec, layer) for layer in layers})
