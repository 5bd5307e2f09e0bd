"""Maps from vision features to rows of the decoder."""

from __future__ import annotations

from torch import Tensor, nn

from edgevlm.model.layers import Activate
from edgevlm.model.norms import build_norm
from edgevlm.model.spec import ProjectorSpec


class MlpProjector(nn.Module):
    """Up, activation, down: a row stays a row (LLaVA)."""

    def __init__(self, spec: ProjectorSpec) -> None:
        """Build the two maps."""
        super().__init__()
        self.up = nn.Linear(spec.in_width, spec.hidden_width, bias=spec.bias)
        self.act = Activate(spec.activation)
        self.down = nn.Linear(spec.hidden_width, spec.out_width, bias=spec.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map [N, rows, in] to [N, rows, out]."""
        out: Tensor = self.down(self.act(self.up(x)))
        return out


class Shuffle(nn.Module):
    """Squares of patches in raster order become rows: their features side by side."""

    def __init__(self, merge: int) -> None:
        """Hold the side of a square."""
        super().__init__()
        self.merge = merge

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map [N, h * w, W] to [N, h * w / m^2, m^2 * W]."""
        (height, width), side = grid, self.merge
        x = x.reshape(-1, height // side, side, width // side, side * x.shape[-1])
        return x.transpose(2, 3).reshape(x.shape[0], -1, side * x.shape[-1])


class PixelShuffleProjector(nn.Module):
    """Squares of patches become rows, then one linear map (Idefics3, SmolVLM)."""

    def __init__(self, spec: ProjectorSpec) -> None:
        """Build the map."""
        super().__init__()
        self.shuffle = Shuffle(spec.merge)
        self.linear = nn.Linear(spec.in_width * spec.merge**2, spec.out_width, bias=spec.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map [N, rows, in] to [N, rows / m^2, out]."""
        out: Tensor = self.linear(self.shuffle(x, grid))
        return out


class PatchMerger(nn.Module):
    """A norm, then squares of patches become rows, then up, activation, down (Qwen2-VL)."""

    def __init__(self, spec: ProjectorSpec) -> None:
        """Build the norm and the two maps."""
        super().__init__()
        assert spec.norm is not None
        self.row_width = spec.in_width * spec.merge**2
        self.norm = build_norm(spec.in_width, spec.norm)
        self.up = nn.Linear(self.row_width, spec.hidden_width, bias=spec.bias)
        self.act = Activate(spec.activation)
        self.down = nn.Linear(spec.hidden_width, spec.out_width, bias=spec.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map [N, rows, in], the patches of a square side by side, to [N, rows / m^2, out]."""
        squares = self.norm(x).reshape(x.shape[0], -1, self.row_width)
        out: Tensor = self.down(self.act(self.up(squares)))
        return out


Projector = MlpProjector | PixelShuffleProjector | PatchMerger
PROJECTORS: dict[str, type[Projector]] = {
    "mlp": MlpProjector,
    "patch_merger": PatchMerger,
    "pixel_shuffle": PixelShuffleProjector,
}


def build_projector(spec: ProjectorSpec) -> Projector:
    """The module of a projector."""
    return PROJECTORS[spec.kind](spec)
