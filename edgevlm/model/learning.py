"""What the pieces of a stage have learned, as weights of a module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from edgevlm.model.spec import VlmSpec
from edgevlm.reduce.extent import extent_of
from edgevlm.reduce.learned import drawn
from edgevlm.reduce.plan import Stage
from edgevlm.reduce.view import View

__all__ = ["Learning"]


class Learning(nn.Module):
    """What the pieces of a stage have learned; before training, what that begins with."""

    def __init__(self, stage: Stage, spec: VlmSpec) -> None:
        """Make every weight for the sizes of a model."""
        super().__init__()
        device = torch.get_default_device()
        self.learned = nn.ModuleDict()
        for piece in stage.pieces:
            weights = {
                name: nn.Parameter(
                    torch.from_numpy(drawn(f"{piece.name}.{name}", weight)).to(device),
                    requires_grad=False,
                )
                for name, weight in piece.weights(extent_of(spec, stage)).items()
            }
            if weights:
                self.learned[piece.name] = nn.ParameterDict(weights)

    def weights_of(self, piece: str) -> Mapping[str, Tensor]:
        """The weights of a piece."""
        weights = self.learned[piece]
        assert isinstance(weights, nn.ParameterDict)
        return dict(weights.items())

    def taught(self, view: View[Tensor]) -> View[Tensor]:
        """With the weights of the pieces."""
        if not len(self.learned):
            return view
        return replace(view, learned={piece: self.weights_of(piece) for piece in self.learned})
