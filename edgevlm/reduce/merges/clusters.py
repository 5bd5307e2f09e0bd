"""Clusters around density peaks (DPC-KNN), which PPE, SparseVLM and others merge tokens by.

A token's density is exp(-d) with d the mean squared distance to its nearest tokens, itself counted
among them; its distance from the next peak is that to the nearest token of higher density. Centres
are the tokens with the largest product of both. Every token goes to the nearest centre, and a
cluster leaves as the mean of its members, where its centre stood (Du et al. 2016,
https://doi.org/10.1016/j.knosys.2016.02.001).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgevlm.reduce.members import way_of_members
from edgevlm.reduce.piece import Merge, Site, StaticClass, register
from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import nearest, numpy_sizes_of, picked, sizes_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View


LEAST = 1e-12
"""No squared distance is taken for less: twins are no peaks."""


@register
class Clusters(Merge):
    """As many clusters as tokens are to leave, in the order of their centres."""

    name: ClassVar[str] = "clusters"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("encoder", "projector")
    ops: ClassVar[tuple[str, ...]] = ("ArgMax",)

    neighbours: int = Field(
        5, ge=1, description="How many tokens, with itself, tell how dense it is around one."
    )

    def macs(self, extent: Extent) -> int:
        """Every token by every token, and the sums of the clusters with their sizes."""
        rows, count = extent.tokens, extent.kept
        number = min(self.neighbours, rows)
        return (
            rows * rows * extent.width
            + count * rows * (extent.width + 1)
            + rows * extent.chosen_macs(rows, number)
            + extent.chosen_macs(rows, count)
            + extent.taken_macs(count, rows, rows)
        )

    def torch(self, view: View[Tensor], count: int) -> VisSeq[Tensor]:
        """All distances once; who belongs where is a matrix of zeros and ones."""
        import torch

        from edgevlm_export.ops import take_rows, top_rows

        tokens = view.tokens
        num_tokens, width = tokens.features.shape[1:]
        square = (tokens.features * tokens.features).sum(-1, keepdim=True)
        apart = square + square.mT - 2.0 * tokens.features @ tokens.features.mT
        rows = torch.arange(num_tokens)
        # A token's distance to itself is 0, whatever rounding says.
        others = 1.0 - (rows[:, None] == rows).to(square.dtype)
        apart = torch.relu(apart) * others * (1.0 / width)
        number = min(self.neighbours, num_tokens)
        near = nearest(apart * -1.0, number, dense=view.dense)
        # Densities and their products with distances are only compared: logarithms will do.
        density = (near * apart).sum(-1) * (-1.0 / number)
        ours, theirs = density[:, :, None], density[:, None]
        # Of equal densities, the first token's is taken for the higher.
        is_higher = (theirs > ours) | ((theirs == ours) & (rows[:, None] > rows))
        from_peak = torch.where(is_higher, apart, apart.amax((1, 2), keepdim=True)).amin(-1)
        from_peak = torch.log(torch.maximum(from_peak, torch.tensor(LEAST))) / 2.0
        centres, _ = top_rows(density + from_peak, count, view.dense)
        is_centre = (centres[:, :, None] == rows).to(square.dtype)
        to_centre = take_rows(apart, centres, view.dense)
        goes_to = (to_centre * -1.0).argmax(1, keepdim=True)
        goes = (goes_to == torch.arange(count)[:, None]).to(square.dtype)
        # A centre stays in its own cluster, even if another is as near.
        members = goes * (1.0 - is_centre.sum(1, keepdim=True)) + is_centre
        sizes = sizes_of(tokens)
        sums = members @ torch.cat([tokens.features * sizes, sizes], -1)
        return VisSeq(
            features=sums[..., :-1] / sums[..., -1:],
            places=picked(tokens.places, centres, dense=view.dense),
            sizes=sums[..., -1:].flatten(1),
            provenance=None if tokens.provenance is None else way_of_members(members > 0),
        )

    def numpy(self, view: View[np.ndarray], count: int) -> VisSeq[np.ndarray]:
        """Token by token."""
        import numpy as np

        tokens, all_sizes = view.tokens, numpy_sizes_of(view.tokens)
        features, places, sizes = [], [], []
        way = np.zeros(tokens.places.shape, np.int64)
        for group, x in enumerate(tokens.features.astype(np.float64)):
            rows = range(len(x))
            apart = np.square(x[:, None] - x).mean(-1)
            density = [np.exp(-np.sort(line)[: self.neighbours].mean()) for line in apart]
            product = []
            for row in rows:
                peaks = [o for o in rows if (density[o], -o) > (density[row], -row)]
                from_peak = apart[row, peaks].min() if peaks else apart.max()
                product.append(density[row] * np.sqrt(from_peak))
            centres = sorted(sorted(rows, key=lambda row: -product[row])[:count])
            members: dict[int, list[int]] = {centre: [centre] for centre in centres}
            for row in rows:
                if row not in members:
                    members[centres[int(apart[row, centres].argmin())]].append(row)
            for number, (centre, cluster) in enumerate(members.items()):
                way[group, cluster] = number
                size = all_sizes[group, cluster]
                features.append((x[cluster] * size[:, None]).sum(0) / size.sum())
                places.append(tokens.places[group, centre])
                sizes.append(size.sum())
        shape = (len(tokens.features), count)
        return VisSeq(
            features=np.array(features).reshape(*shape, -1),
            places=np.array(places).reshape(shape),
            sizes=np.array(sizes).reshape(shape),
            provenance=way,
        )
