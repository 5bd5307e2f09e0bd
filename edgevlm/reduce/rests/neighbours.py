"""Every kept token takes in what lies near it, and one more token all that is left (PruMerge).

Near are the tokens whose keys are most alike, with all heads side by side; they come weighted by
the attention they receive, kept ones among them, and the sum is not divided by the weights (LLaVA-
PruMerge, arXiv 2403.15388).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgevlm.reduce.members import way_of_members
from edgevlm.reduce.piece import Rest, Site, StaticClass, register
from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import nearest, numpy_patches, numpy_unit, patches, unit

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View

SELF = 4.0
"""Taken from a cosine, it puts a token behind all others."""


@register
class Neighbours(Rest):
    """Of the tokens that leave, one is the sum of what was not kept."""

    name: ClassVar[str] = "neighbours"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("encoder", "projector")
    ops: ClassVar[tuple[str, ...]] = ("ArgMax",)
    scorers: ClassVar[tuple[str, ...]] = ("encoder_attention",)

    count: int = Field(32, ge=1, description="How many tokens each kept one takes in, at most.")
    layer: int = Field(-1, le=-1, description="Whose keys say what is near.")

    @property
    def needs(self) -> frozenset[str]:
        """Keys of a layer."""
        return frozenset({"attention"})

    @property
    def layers(self) -> frozenset[int]:
        """The layer."""
        return frozenset({self.layer})

    def macs(self, extent: Extent) -> int:
        """Keys of the kept tokens by all keys, and the sums of what comes to each."""
        rows, kept, width = extent.tokens, extent.kept - extent.extra, extent.width
        keys = extent.layers[self.layer].attention.kv_width
        total = kept * rows * keys + extent.kept * rows * width
        total += kept * extent.chosen_macs(rows, min(self.count, rows - 1))
        return total + extent.taken_macs(kept, rows, keys + width)

    def extra(self, keep: int, num_tokens: int) -> int:
        """One, where that is not all that is kept."""
        return min(1, keep - 1)

    def torch(self, view: View[Tensor], scores: Tensor, kept: Tensor, extra: int) -> VisSeq[Tensor]:
        """What comes to a token is a row of a matrix of attention and zeros."""
        import torch

        from edgevlm_export.ops import take_rows

        tokens, probe = view.tokens, view.probes[self.layer]
        num_tokens = scores.shape[1]
        is_self = (kept[:, :, None] == torch.arange(num_tokens)).to(scores.dtype)
        keys = unit(patches(view, probe, probe.k))
        likeness = take_rows(keys, kept, view.dense) @ keys.mT - SELF * is_self
        near = nearest(likeness, min(self.count, num_tokens - 1), dense=view.dense)
        left = 1.0 - is_self.sum(1, keepdim=True)
        came = torch.cat([near, left], 1) * scores[:, None] @ tokens.features
        features = take_rows(tokens.features, kept, view.dense) + came[:, :-1]
        # What is left stands where the first of it stood.
        places = torch.cat([kept, left.argmax(-1)], 1)
        number = left.sum(-1)
        sizes = torch.cat([kept.to(scores.dtype) * 0.0 + 1.0, number], 1)
        way = None
        if tokens.provenance is not None:
            way = way_of_members(torch.cat([is_self, left], 1) > 0)
        return VisSeq(
            features=torch.cat([features, came[:, -1:]], 1),
            places=places,
            sizes=sizes,
            provenance=way,
        )

    def numpy(
        self, view: View[np.ndarray], scores: np.ndarray, kept: np.ndarray, extra: int
    ) -> VisSeq[np.ndarray]:
        """Token by token."""
        import numpy as np

        tokens, probe = view.tokens, view.probes[self.layer]
        keys = numpy_unit(numpy_patches(view, probe, probe.k).astype(np.float64))
        features, places, sizes = [], [], []
        way = np.full(scores.shape, kept.shape[1])
        for group, rows in enumerate(kept):
            x, weights = tokens.features[group].astype(np.float64), scores[group]
            made = []
            for row in rows:
                others = [other for other in range(len(x)) if other != row]
                others.sort(key=lambda other: -(keys[group, row] @ keys[group, other]))
                made.append(x[row] + sum(weights[near] * x[near] for near in others[: self.count]))
            way[group, rows] = np.arange(len(rows))
            rest = [row for row in range(len(x)) if row not in rows]
            made.append(sum(weights[row] * x[row] for row in rest))
            features.append(made)
            places.append([*rows, rest[0]])
            sizes.append([*np.ones(len(rows)), len(rest)])
        return VisSeq(
            features=np.array(features),
            places=np.array(places),
            sizes=np.array(sizes),
            provenance=way,
        )
