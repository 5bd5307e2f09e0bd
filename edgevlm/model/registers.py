"""Learned rows that pass an encoder behind the patches, and what they get in its layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from edgevlm.model.stages import StageModule
from edgevlm.reduce.merges.registers import Registers

__all__ = ["RegisterRows", "registers_of"]


class RegisterRows:
    """Learned rows that pass the layers behind the patches."""

    def __init__(self, module: StageModule, piece: Registers) -> None:
        """Hold the stage whose weights they are."""
        self.module, self.piece = module, piece

    @property
    def rows(self) -> Tensor:
        """As they come to the first layer [M, W]."""
        return self.module.weights_of(self.piece.name)["rows"]

    def given(self, layer: int) -> Callable[[Tensor], Tensor]:
        """What becomes of what the attention of a layer gave all rows."""
        weights = self.module.weights_of(self.piece.name)
        return lambda x: self.piece.attended(weights, layer, x)


def registers_of(modules: nn.ModuleList) -> RegisterRows | None:
    """The registers of an encoder, where a stage behind it takes them."""
    for module in modules:
        assert isinstance(module, StageModule)
        merge = module.stage().merge
        if isinstance(merge, Registers):
            return RegisterRows(module, merge)
    return None
