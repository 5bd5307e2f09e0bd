"""Bipartite soft matching (ToMe, arXiv 2210.09461): tokens of even places find a like odd one.

The tokens are split in two by turns; every one of the first half has one best partner in the other,
by the cosine of their keys, and the best pairs are merged into means, weighted by what each token
was merged from already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from edgevlm.reduce.piece import Merge, Site, StaticClass, register
from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import (
    mean_keys,
    numpy_mean_keys,
    numpy_patches,
    numpy_unit,
    patches,
    picked,
    unit,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View


FAR = 2**31
"""Behind every place."""


@register
class Bipartite(Merge):
    """At most half of the tokens go in one stage; those left stay in the order of their places."""

    name: ClassVar[str] = "bipartite"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("encoder.layers", "encoder", "projector")
    ops: ClassVar[tuple[str, ...]] = ("ArgMax",)

    @property
    def needs(self) -> frozenset[str]:
        """Keys."""
        return frozenset({"attention"})

    def macs(self, extent: Extent) -> int:
        """Keys of one half by those of the other, and the sums of pairs with their sizes."""
        even, odd = (extent.tokens + 1) // 2, extent.tokens // 2
        going, width = extent.tokens - extent.kept, extent.width + 1
        size = extent.layers["own"].attention.head_dim
        return (
            even * odd * size
            + odd * going * width
            + extent.chosen_macs(even, going, even - going)
            + extent.taken_macs(even, even, width)
        )

    def torch(self, view: View[Tensor], count: int) -> VisSeq[Tensor]:
        """Who goes where is a matrix of zeros and ones."""
        import torch

        from edgevlm_export.ops import take_rows, top_rows

        tokens, probe = view.tokens, view.probes["own"]
        num_tokens = tokens.features.shape[1]
        keys = unit(patches(view, probe, mean_keys(probe, probe.k)))
        even, odd = keys[:, ::2], keys[:, 1::2]
        best, partner = (even @ odd.mT).max(-1)
        going, staying = top_rows(best, num_tokens - count, view.dense)
        goes_to = picked(partner, going, dense=view.dense)
        weights = (goes_to[:, None] == torch.arange(odd.shape[1])[:, None]).to(keys.dtype)
        sizes = sizes_of(tokens)
        # The sizes travel as one more feature: both are sums.
        sums = torch.cat([tokens.features * sizes, sizes], -1)
        even_sums, odd_sums = sums[:, ::2], sums[:, 1::2]
        odd_sums = odd_sums + weights @ take_rows(even_sums, going, view.dense)
        sums = torch.cat([take_rows(even_sums, staying, view.dense), odd_sums], 1)
        # A pair stands where the first of its tokens stood.
        even_places, odd_places = tokens.places[:, ::2], tokens.places[:, 1::2]
        came = torch.where(weights > 0, picked(even_places, going, dense=view.dense)[:, None], FAR)
        none = odd_places[:, :, None]
        odd_places = torch.cat([none, came], -1).amin(-1)
        places = torch.cat([picked(even_places, staying, dense=view.dense), odd_places], 1)
        features, sizes = sums[..., :-1] / sums[..., -1:], sums[..., -1:].flatten(1)
        return VisSeq(features=features, places=places, sizes=sizes)

    def numpy(self, view: View[np.ndarray], count: int) -> VisSeq[np.ndarray]:
        """Pair by pair."""
        import numpy as np

        tokens, probe = view.tokens, view.probes["own"]
        batch, num_tokens, _ = tokens.features.shape
        all_keys = numpy_unit(numpy_patches(view, probe, numpy_mean_keys(probe, probe.k)))
        sizes = np.ones((batch, num_tokens)) if tokens.sizes is None else tokens.sizes
        features, places, counts = [], [], []
        for group, keys in enumerate(all_keys):
            evens, odds = range(0, num_tokens, 2), range(1, num_tokens, 2)
            likeness = keys @ keys.T
            pairs = {even: 1 + 2 * int(likeness[even, 1::2].argmax()) for even in evens}
            best = np.array([likeness[even, pairs[even]] for even in evens])
            order = [evens[place] for place in np.argsort(-best, kind="stable")]
            going = set(order[: num_tokens - count])
            members = {even: [even] for even in evens if even not in going}
            members |= {odd: [odd, *(e for e in sorted(going) if pairs[e] == odd)] for odd in odds}
            for rows in members.values():
                size = sizes[group, rows]
                features.append((tokens.features[group, rows] * size[:, None]).sum(0) / size.sum())
                places.append(tokens.places[group, rows].min())
                counts.append(size.sum())
        shape = (batch, count)
        return VisSeq(
            features=np.array(features).reshape(*shape, -1),
            places=np.array(places).reshape(shape),
            sizes=np.array(counts).reshape(shape),
        )


def sizes_of(tokens: VisSeq[Tensor]) -> Tensor:
    """What each token was merged from [B, N, 1], ones where nothing was."""
    if tokens.sizes is not None:
        return tokens.sizes[..., None]
    return tokens.features[..., :1] * 0.0 + 1.0
