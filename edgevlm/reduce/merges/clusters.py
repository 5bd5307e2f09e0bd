"""Clusters around density peaks (DPC-KNN), which PPE and others merge tokens by.

Every token goes to the nearest centre, and a cluster leaves as the mean of its members, where its
centre stood.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgevlm.reduce.density import density_clusters, numpy_density_clusters
from edgevlm.reduce.members import way_of_members
from edgevlm.reduce.piece import Merge, Site, StaticClass, register
from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import numpy_sizes_of, picked, sizes_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View


@register
class Clusters(Merge):
    """As many clusters as tokens are to leave, in the order of their centres."""

    name: ClassVar[str] = "clusters"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("encoder", "projector")
    ops: ClassVar[tuple[str, ...]] = ("ArgMax",)

    neighbours: int = Field(
        5, ge=2, description="How many tokens, with itself, tell how dense it is around one."
    )

    def macs(self, extent: Extent) -> int:
        """Every token by every token, and the sums of the clusters with their sizes."""
        rows, count = extent.tokens, extent.kept
        return (
            rows * rows * extent.width
            + count * rows * (extent.width + 1)
            + extent.chosen_macs(rows, count)
            + extent.taken_macs(count, rows, rows)
        )

    def torch(self, view: View[Tensor], count: int) -> VisSeq[Tensor]:
        """Who belongs where is a matrix of zeros and ones."""
        import torch

        tokens = view.tokens
        centres, members = density_clusters(tokens.features, count, self.neighbours, view.dense)
        sizes = sizes_of(tokens)
        sums = members @ torch.cat([tokens.features * sizes, sizes], -1)
        return VisSeq(
            features=sums[..., :-1] / sums[..., -1:],
            places=picked(tokens.places, centres, dense=view.dense),
            sizes=sums[..., -1:].flatten(1),
            provenance=None if tokens.provenance is None else way_of_members(members > 0),
        )

    def numpy(self, view: View[np.ndarray], count: int) -> VisSeq[np.ndarray]:
        """Cluster by cluster."""
        import numpy as np

        tokens, all_sizes = view.tokens, numpy_sizes_of(view.tokens)
        centres, members = numpy_density_clusters(tokens.features, count, self.neighbours)
        features = np.zeros((*centres.shape, tokens.features.shape[2]))
        sizes = np.zeros(centres.shape)
        for group, cluster in np.ndindex(*centres.shape):
            rows = np.flatnonzero(members[group, cluster])
            weights = all_sizes[group, rows]
            features[group, cluster] = np.average(tokens.features[group, rows], 0, weights)
            sizes[group, cluster] = weights.sum()
        places = np.take_along_axis(tokens.places, centres, 1)
        way = members.argmax(1)
        return VisSeq(features=features, places=places, sizes=sizes, provenance=way)
