"""What matters most, and of the rest as much by relevance as by difference from it (EfficientVLA).

arXiv 2506.10100. The few most relevant tokens are kept first; of the places left a share goes to
the next in relevance, the others to the tokens that are least like any of the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgevlm.reduce.piece import Choice, StaticClass, register
from edgevlm.reduce.view import numpy_unit, unit

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.view import View

LAST = 1e9
"""Taken from a difference, it puts a token behind all others."""


@register
class RelevantDiverse(Choice):
    """`key` tokens by score, then `alpha` of the others by score and the rest by difference."""

    name: ClassVar[str] = "relevant_diverse"
    static_class: ClassVar[StaticClass] = "S1"
    by_score: ClassVar[bool] = True

    key: int = Field(8, ge=1, description="Tokens of the best scores that are kept first.")
    alpha: float = Field(0.5, ge=0, le=1, description="Of the others, the share by score.")

    def torch(self, view: View[Tensor], scores: Tensor | None, count: int) -> Tensor:
        """By score first: key tokens are the best of them, so both are one TopK."""
        import torch

        from edgevlm_export.ops import take_rows, top_rows

        assert scores is not None, "checked when the stage was read"
        num_key, num_relevant = self._counts(count)
        relevant, _ = top_rows(scores, num_relevant, view.dense)
        if num_relevant == count:
            return relevant
        places = torch.arange(scores.shape[1])
        tokens = unit(view.tokens.features)
        key, _ = top_rows(scores, num_key, view.dense)
        likeness = (tokens @ take_rows(tokens, key, view.dense).mT).amax(-1)
        is_relevant = (relevant[:, :, None] == places).to(scores.dtype).sum(1)
        others, _ = top_rows(-1.0 * likeness - LAST * is_relevant, count - num_relevant, view.dense)
        is_other = (others[:, :, None] == places).to(scores.dtype).sum(1)
        kept, _ = top_rows(is_relevant + is_other, count, view.dense)
        return kept

    def numpy(self, view: View[np.ndarray], scores: np.ndarray | None, count: int) -> np.ndarray:
        """Three lists, one after the other."""
        import numpy as np

        assert scores is not None
        num_key, num_relevant = self._counts(count)
        found = []
        for group, row in enumerate(scores):
            order = list(np.argsort(-row, kind="stable"))
            tokens = numpy_unit(view.tokens.features[group])
            likeness = (tokens @ tokens[order[:num_key]].T).max(1)
            others = sorted(order[num_relevant:], key=lambda place: (likeness[place], place))
            found.append(sorted([*order[:num_relevant], *others[: count - num_relevant]]))
        return np.array(found, np.int64)

    def _counts(self, count: int) -> tuple[int, int]:
        """How many are key, and how many are there by score, those included."""
        num_key = min(self.key, count)
        return num_key, num_key + round(self.alpha * (count - num_key))
