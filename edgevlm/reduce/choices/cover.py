"""Tokens that cover the question and the picture, greedily (MMTok, arXiv 2508.18264).

Every word of the question and every visual token wants to be covered by a kept token that is like
it; the gain of a token is what it adds to the best so far. Words are compared in the space of the
decoder, visual tokens in that of the encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from edgevlm.reduce.piece import Choice, Site, StaticClass, register
from edgevlm.reduce.view import numpy_unit, unit

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View


@register
class Cover(Choice):
    """Greedy coverage of [text; alpha * picture]; temperatures sharpen both."""

    name: ClassVar[str] = "cover"
    static_class: ClassVar[StaticClass] = "S2"
    sites: ClassVar[tuple[Site, ...]] = ("projector",)

    query: Literal["text", "question", "words"] = "words"
    alpha: float = Field(0.5, ge=0)
    text_temperature: float = Field(0.02, gt=0)
    picture_temperature: float = Field(0.2, gt=0)

    @property
    def needs(self) -> frozenset[str]:
        """The question before the picture is encoded, and what the encoder makes of it."""
        return frozenset({"question", "encoded"})

    def macs(self, extent: Extent) -> int:
        """Words by tokens in the decoder's space, tokens by tokens in the encoder's."""
        words = extent.question * extent.width
        return extent.tokens * (words + extent.tokens * extent.encoded)

    def torch(self, view: View[Tensor], scores: Tensor | None, count: int) -> Tensor:
        """Gains [B, N, Q + N], one row per token that may be kept."""
        import torch

        from edgevlm_export.ops import cover_rows

        assert view.question is not None
        tokens, words = unit(view.tokens.features), unit(view.question)
        asked = view.asked[self.query]
        asked = asked / asked.sum(-1, keepdim=True)
        likeness = (words @ tokens.mT) / self.text_temperature
        to_text = likeness.softmax(-1) * asked[..., None]
        seen = unit(_encoded(view))
        of_picture = (seen @ seen.mT / self.picture_temperature).softmax(-1)
        of_picture = of_picture * (self.alpha / seen.shape[1])
        gains = torch.cat([to_text, of_picture], dim=1).mT
        return cover_rows(gains, None, count)

    def numpy(self, view: View[np.ndarray], scores: np.ndarray | None, count: int) -> np.ndarray:
        """By definition: at every step the whole gain of every token."""
        import numpy as np

        assert view.question is not None
        found = []
        for tokens, seen in zip(view.tokens.features, _numpy_encoded(view), strict=True):
            words, rows, seen = (numpy_unit(x) for x in (view.question[0], tokens, seen))
            asked = view.asked[self.query][0] / view.asked[self.query][0].sum()
            to_text = _softmax(words @ rows.T / self.text_temperature) * asked[:, None]
            of_picture = _softmax(seen @ seen.T / self.picture_temperature) / len(seen)
            whole = np.concatenate([to_text, self.alpha * of_picture])
            best, chosen = np.zeros(len(whole)), list[int]()
            while len(chosen) < count:
                gains = np.maximum(whole - best[:, None], 0).sum(0)
                gains[chosen] = -1.0
                chosen.append(int(gains.argmax()))
                best = np.maximum(best, whole[:, chosen[-1]])
            found.append(sorted(chosen))
        return np.array(found, np.int64)


def _encoded(view: View[Tensor]) -> Tensor:
    """The encoder's features [B, N, Dv] of the tokens."""
    encoded = view.encoded
    assert encoded is not None
    if view.squares is None:
        return encoded
    count, size = view.squares.shape
    squares: Tensor = encoded.index_select(1, view.squares.flatten()).unflatten(1, (count, size))
    return squares.mean(2)


def _numpy_encoded(view: View[np.ndarray]) -> np.ndarray:
    """The twin of `_encoded`."""
    assert view.encoded is not None
    if view.squares is None:
        return view.encoded
    found: np.ndarray = view.encoded[:, view.squares].mean(2)
    return found


def _softmax(x: np.ndarray) -> np.ndarray:
    import numpy as np

    weights = np.exp(x - x.max(-1, keepdims=True))
    found: np.ndarray = weights / weights.sum(-1, keepdims=True)
    return found
