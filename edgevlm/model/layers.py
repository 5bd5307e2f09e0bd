"""The residual layer of vision encoders and decoders, and its MLP."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from edgevlm.model.attention import Attention, KeySource
from edgevlm.model.norms import build_norm
from edgevlm.model.spec import LayerSpec, MlpSpec
from edgevlm_export.ops import activate, gated


class Activate(nn.Module):
    """One activation."""

    def __init__(self, kind: str) -> None:
        """Hold its name."""
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return activate(x, self.kind)


class Gate(nn.Module):
    """One activation of the gate, times the other projection."""

    def __init__(self, kind: str) -> None:
        """Hold the activation's name."""
        super().__init__()
        self.kind = kind

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply the activated gate by `up`."""
        return gated(gate, up, self.kind)


class PlainMlp(nn.Module):
    """Up, activation, down."""

    def __init__(self, width: int, spec: MlpSpec) -> None:
        """Build the two projections."""
        super().__init__()
        self.up = nn.Linear(width, spec.width, bias=spec.bias)
        self.act = Activate(spec.activation)
        self.down = nn.Linear(spec.width, width, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., W] to [..., W]."""
        out: Tensor = self.down(self.act(self.up(x)))
        return out


class GatedMlp(nn.Module):
    """Gate and up, activation of the gate, down."""

    def __init__(self, width: int, spec: MlpSpec) -> None:
        """Build the three projections."""
        super().__init__()
        self.gate = nn.Linear(width, spec.width, bias=spec.bias)
        self.up = nn.Linear(width, spec.width, bias=spec.bias)
        self.act = Gate(spec.activation)
        self.down = nn.Linear(spec.width, width, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., W] to [..., W]."""
        out: Tensor = self.down(self.act(self.gate(x), self.up(x)))
        return out


class Layer(nn.Module):
    """Attention and MLP, each after a norm and added to what came in."""

    def __init__(self, width: int, spec: LayerSpec) -> None:
        """Build a layer as its spec says."""
        super().__init__()
        self.spec = spec
        self.norm1 = build_norm(width, spec.norm1)
        self.attention = Attention(width, spec.attention)
        self.norm2 = build_norm(width, spec.norm2)
        self.mlp = (GatedMlp if spec.mlp.gated else PlainMlp)(width, spec.mlp)

    def forward(
        self,
        x: Tensor,
        keys: KeySource,
        between: Callable[[Tensor], Tensor] | None = None,
        given: Callable[[Tensor], Tensor] | None = None,
        weights: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Tensor:
        """Map [B, T, W] to [B, T, W].

        `given` may change what attention gives before it is added, `between` may make rows fewer
        behind. `weights` [B, T, 1] are how much rows get of what attention and MLP add, None for
        all of it; the MLP sees what attention added whole.
        """
        mixed = self.attention(self.norm1(x), keys)
        added = mixed if given is None else given(mixed)
        inner = x + added
        if between is not None:
            inner = between(inner)
        more: Tensor = self.mlp(self.norm2(inner))
        by_attention, by_mlp = weights
        if by_attention is not None:
            inner = x + by_attention * added
        out: Tensor = inner + (more if by_mlp is None else by_mlp * more)
        return out
