"""Learned rows that pass the encoder beside the patches and leave in their place (FALCON).

FALCON (arXiv 2501.16297) puts M learned rows behind the patches of a picture. They attend to
patches and to each other in every layer, and behind the last one they alone go on. In every layer
one more attention among the registers of all crops of a picture, added to what the layer's own
attention gave them, keeps crops from telling the same; here a picture is one crop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgevlm.document import Complaint
from edgevlm.reduce.learned import Weight, attended, attention_macs, attention_weights, check_heads
from edgevlm.reduce.order import even_places
from edgevlm.reduce.piece import Merge, Site, StaticClass, register
from edgevlm.reduce.seq import VisSeq
from edgevlm_runtime.images.spec import ImageSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.model.spec import VlmSpec
    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.options import StageOptions
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


def check_registers(spec: VlmSpec, stage: StageOptions, number: int) -> None:
    """Raise Complaint where registers cannot pass an encoder beside all of its patches."""
    if spec.vision.position == "rotary":
        raise Complaint(
            "patches of this encoder turn with their places in every layer, and registers have "
            "none",
            hint="choose another merge",
        )
    if number > 1:
        raise Complaint(
            "registers leave in place of all patches, of which a stage before it took some",
            hint="put it first",
        )
    for grid in spec.vision.grids:
        if spec.patch_tokens(grid) != math.prod(grid):
            raise Complaint(
                f"{spec.patch_tokens(grid)} rows leave the encoder, which are not its "
                f"{math.prod(grid)} patches",
                hint="choose another merge",
            )
    is_tiled = ImageSpec.from_json(spec.image).geometry.kind == "tiled"
    if is_tiled and getattr(stage.merge, "reatten", False):
        raise Complaint(
            "registers of all tiles of a picture attend to each other, and tiles come one at a "
            "time",
            hint="write reatten: false, or image.split: false",
        )
