"""Random scores, the same for every picture: the baseline that says what a choice is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from edgevlm.reduce.piece import Scorer, StaticClass, register

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.reduce.view import View


@register
class Random(Scorer):
    """A seeded order of the tokens."""

    name: ClassVar[str] = "random"
    static_class: ClassVar[StaticClass] = "S3"

    seed: int = Field(0, ge=0)

    def torch(self, view: View[Tensor]) -> Tensor:
        """A constant."""
        import torch

        batch, count, _ = view.tokens.features.shape
        return torch.from_numpy(self._order(count)).expand(batch, count)

    def numpy(self, view: View[np.ndarray]) -> np.ndarray:
        """The same constant."""
        batch, count, _ = view.tokens.features.shape
        return np.tile(self._order(count), (batch, 1))

    def _order(self, count: int) -> np.ndarray:
        """Distinct whole numbers."""
        return np.random.default_rng(self.seed).permutation(count).astype(np.float32)
