"""Learned rows that stand for a picture (VoCo-LLaMA, arXiv 2406.12275).

Behind the N visual tokens of a picture stand m rows, the same for every picture: embeddings of m
tokens that no text has. In every layer of the decoder they see the picture and all that is before
it. What follows sees the m rows and not the N tokens, so that whatever it knows of the picture has
gone through them, and keys and values of the m rows are all that a cache keeps of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgevlm.reduce.learned import Weight, learned, numpy_learned
from edgevlm.reduce.piece import Bottleneck, register

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View

DEVIATION = 0.02
"""Of the rows before training, as of other embeddings."""


@register
class LearnedRows(Bottleneck):
    """A table of m rows [m, C]."""

    name: ClassVar[str] = "learned_rows"
    is_learned: ClassVar[bool] = True

    def weights(self, extent: Extent) -> Mapping[str, Weight]:
        """The table [m, C]."""
        return {"rows": Weight(shape=(extent.kept, extent.width), deviation=DEVIATION)}

    def torch(self, view: View[Tensor], count: int) -> Tensor:
        """As they are."""
        return learned(view, self.name)["rows"]

    def numpy(self, view: View[np.ndarray], count: int) -> np.ndarray:
        """As they are."""
        return numpy_learned(view, self.name)["rows"]
