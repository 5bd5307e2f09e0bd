"""Evenly spaced tokens: the baseline that every method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from edgevlm.reduce.lattice import spaced_rows
from edgevlm.reduce.piece import Choice, Site, StaticClass, register

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.view import View


@register
class Uniform(Choice):
    """The same tokens of every picture, spread over the grid."""

    name: ClassVar[str] = "uniform"
    static_class: ClassVar[StaticClass] = "S0"
    sites: ClassVar[tuple[Site, ...]] = ("input", "encoder", "projector", "decoder")

    def torch(self, view: View[Tensor], scores: Tensor | None, count: int) -> Tensor:
        """Constant rows."""
        import torch

        batch, num_tokens, _ = view.tokens.features.shape
        rows = torch.tensor(spaced_rows(view.tokens.grid, num_tokens, count))
        return rows.expand(batch, count)

    def numpy(self, view: View[np.ndarray], scores: np.ndarray | None, count: int) -> np.ndarray:
        """Constant rows."""
        import numpy as np

        batch, num_tokens, _ = view.tokens.features.shape
        rows = np.array(spaced_rows(view.tokens.grid, num_tokens, count), np.int64)
        return np.tile(rows, (batch, 1))
