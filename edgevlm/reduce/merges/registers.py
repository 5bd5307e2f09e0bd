"""Learned rows that pass the encoder beside the patches and leave in their place (FALCON).

FALCON (arXiv 2501.16297) puts M learned rows behind the patches of a picture. They attend to
patches and to each other in every layer, and behind the last one they alone go on. In every layer
one more attention among the registers of all crops of a picture, added to what the layer's own
attention gave them, keeps crops from telling the same; here a picture is one crop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgevlm.reduce.learned import Weight, attended, attention_macs, attention_weights, check_heads
from edgevlm.reduce.order import even_places
from edgevlm.reduce.piece import Merge, Site, StaticClass, register
from edgevlm.reduce.seq import VisSeq

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View


@register
class Registers(Merge):
    """As many registers as tokens are to leave; before training they attend to one another not."""

    name: ClassVar[str] = "registers"
    static_class: ClassVar[StaticClass] = "S0"
    sites: ClassVar[tuple[Site, ...]] = ("encoder",)
    is_learned: ClassVar[bool] = True
    is_ordered: ClassVar[bool] = True

    reatten: bool = Field(
        True, description="One more attention among the registers in every layer of the encoder."
    )

    heads: int = Field(8, ge=1, description="Of that attention.")

    @property
    def needs(self) -> frozenset[str]:
        """Rows of its own beside the patches."""
        return frozenset({"registers"})

    def weights(self, extent: Extent) -> Mapping[str, Weight]:
        """The rows [M, Dv], and an attention for each layer, which begins as none."""
        found = {"rows": Weight(shape=(extent.kept, extent.encoder_width), deviation=1.0)}
        if self.reatten:
            check_heads(extent.encoder_width, self.heads)
            for layer in range(extent.depth):
                found |= attention_weights(f"layer{layer}", extent.encoder_width)
                found[f"layer{layer}_out"] = Weight(
                    shape=(extent.encoder_width, extent.encoder_width), start="zeros"
                )
        return found

    def layer_macs(self, extent: Extent) -> int:
        """Multiply-adds of the attention among registers in a layer; all else is the layer's."""
        if not self.reatten:
            return 0
        return attention_macs(extent.kept, extent.kept, extent.encoder_width)

    def attended(self, weights: Mapping[str, Tensor], layer: int, given: Tensor) -> Tensor:
        """What a layer's attention gave its rows [B, T, Dv], of which the last are registers."""
        import torch

        if not self.reatten:
            return given
        count = weights["rows"].shape[0]
        others, own = given[:, :-count], given[:, -count:]
        own = own + attended(weights, f"layer{layer}", own, own, self.heads)
        return torch.cat([others, own], 1)

    def torch(self, view: View[Tensor], count: int) -> VisSeq[Tensor]:
        """What became of the registers."""
        import torch

        assert view.registers is not None, "an encoder has rows for its registers"
        batch, num_tokens = view.tokens.places.shape
        places = torch.tensor(even_places(num_tokens, count)).expand(batch, count)
        return VisSeq(features=view.registers, places=places)

    def numpy(self, view: View[np.ndarray], count: int) -> VisSeq[np.ndarray]:
        """The same."""
        import numpy as np

        assert view.registers is not None, "an encoder has rows for its registers"
        batch, num_tokens = view.tokens.places.shape
        places = np.tile(even_places(num_tokens, count), (batch, 1))
        return VisSeq(features=view.registers, places=places)
