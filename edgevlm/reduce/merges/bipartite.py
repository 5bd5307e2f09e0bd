"""Bipartite soft matching (ToMe, arXiv 2210.09461): tokens of even places find a like odd one.

The tokens are split in two by turns; every one of the first half has one best partner in the other,
by the cosine of their keys, and the best pairs are merged into means, weighted by what each token
was merged from already.

SimVLG's connector (arXiv 2310.03291) does so in several rounds of as many pairs each, with no layer
of an encoder between that would make new keys: what is alike is then said by the tokens themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from edgevlm.document import Complaint
from edgevlm.reduce.members import (
    begun,
    followed,
    numpy_begun,
    numpy_followed,
    own_columns,
    way_of_members,
)
from edgevlm.reduce.order import even_steps, first_place
from edgevlm.reduce.piece import Merge, Site, StaticClass, register
from edgevlm.reduce.seq import ArrayT, Probe, VisSeq
from edgevlm.reduce.view import (
    mean_keys,
    numpy_mean_keys,
    numpy_patches,
    numpy_sizes_of,
    numpy_unit,
    patches,
    picked,
    ranked,
    sizes_of,
    unit,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View


@register
class Bipartite(Merge):
    """At most half of the tokens go in one round; what is left of the even ones stands first."""

    name: ClassVar[str] = "bipartite"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("encoder.layers", "encoder", "projector")
    ops: ClassVar[tuple[str, ...]] = ("ArgMax",)

    metric: Literal["keys", "features"] = Field(
        "keys", description="What is alike: keys of the layer, or the tokens themselves."
    )
    rounds: int = Field(1, ge=1, description="In how many steps of as many merges each.")

    @property
    def needs(self) -> frozenset[str]:
        """Keys, where they are the metric."""
        return frozenset({"attention"} if self.metric == "keys" else ())

    @property
    def layers(self) -> frozenset[int]:
        """Behind the encoder, its last layer has the keys."""
        return frozenset({-1} if self.metric == "keys" else ())

    def macs(self, extent: Extent) -> int:
        """In every round one half by the other, and the sums of pairs with their sizes."""
        by_keys = self.metric == "keys"
        compared, carried = extent.width, extent.width + 1
        if by_keys:
            compared = extent.layers["own"].attention.head_dim
            carried += compared
        total, here = 0, extent.tokens
        for left in even_steps(extent.tokens, extent.kept, self.rounds):
            even, odd = (here + 1) // 2, here // 2
            staying = even - (here - left)
            total += even * odd * (compared + carried) + extent.chosen_macs(even, staying)
            total += extent.taken_macs(staying, even, carried)
            here = left
        return total

    def check(self, num_tokens: int, count: int) -> None:
        """Every token that goes has a partner of its own half's other."""
        here = num_tokens
        for left in even_steps(num_tokens, count, self.rounds):
            if here - left > here // 2:
                raise Complaint(
                    f"{here - left} of {here} tokens would be merged at once, and half is the "
                    "most that find a partner",
                    hint="keep more tokens, or merge in more steps",
                )
            here = left

    def torch(self, view: View[Tensor], count: int) -> VisSeq[Tensor]:
        """Round by round."""
        tokens = begun(view.tokens)
        keys = None
        if self.metric == "keys":
            probe = _probe(view)
            keys = patches(view, probe, mean_keys(probe, probe.k))
        for left in even_steps(tokens.features.shape[1], count, self.rounds):
            tokens, keys = _merged(tokens, keys, left, dense=view.dense)
        return tokens

    def numpy(self, view: View[np.ndarray], count: int) -> VisSeq[np.ndarray]:
        """Round by round."""
        tokens = numpy_begun(view.tokens)
        keys = None
        if self.metric == "keys":
            probe = _probe(view)
            keys = numpy_patches(view, probe, numpy_mean_keys(probe, probe.k))
        for left in even_steps(tokens.features.shape[1], count, self.rounds):
            tokens, keys = _numpy_merged(tokens, keys, left)
        return tokens


def _probe(view: View[ArrayT]) -> Probe[ArrayT]:
    """The layer's own keys, or those of the last layer behind the encoder."""
    return view.probes["own" if "own" in view.probes else -1]


def _merged(
    tokens: VisSeq[Tensor], keys: Tensor | None, count: int, *, dense: bool
) -> tuple[VisSeq[Tensor], Tensor | None]:
    """The `count` tokens that are left, with their keys, where these are not the features.

    Who goes where is a matrix of zeros and ones [B, odd, even]: it has columns of zeros for the
    tokens that stay, and the way is the same where all of them do.
    """
    import torch

    from edgevlm_export.ops import take_rows, top_rows

    num_tokens, width = tokens.features.shape[1:]
    going = num_tokens - count
    metric = unit(tokens.features if keys is None else keys)
    even, odd = metric[:, ::2], metric[:, 1::2]
    best, partner = (even @ odd.mT).max(-1)
    goes = (ranked(best) < going).to(metric.dtype)
    goes_to = partner[:, None] == torch.arange(odd.shape[1])[:, None]
    weights = goes_to.to(metric.dtype) * goes[:, None]
    sizes = sizes_of(tokens)
    # Sizes, and keys, travel as more features: all of them are sums.
    values = tokens.features if keys is None else torch.cat([tokens.features, keys], -1)
    columns = own_columns(tokens)
    sums = torch.cat([*columns, values * sizes, sizes], -1)
    even_sums, odd_sums = sums[:, ::2], sums[:, 1::2]
    left = [odd_sums + weights @ even_sums]
    # A pair stands where the first of its tokens stood.
    even_places, odd_places = tokens.places[:, ::2], tokens.places[:, 1::2]
    places = [first_place(odd_places, weights, even_places)]
    if going < even.shape[1]:
        _, staying = top_rows(best, going, dense)
        left.insert(0, take_rows(even_sums, staying, dense))
        places.insert(0, picked(even_places, staying, dense=dense))
    sums = torch.cat(left, 1)
    way = tokens.provenance
    if way is not None:
        way = followed(way, way_of_members(sums[..., :num_tokens] > 0), dense=dense)
        sums = sums[..., num_tokens:]
    means = sums[..., :-1] / sums[..., -1:]
    merged = VisSeq(
        features=means[..., :width],
        places=torch.cat(places, 1),
        sizes=sums[..., -1:].flatten(1),
        provenance=way,
    )
    return merged, None if keys is None else means[..., width:]


def _numpy_merged(
    tokens: VisSeq[np.ndarray], keys: np.ndarray | None, count: int
) -> tuple[VisSeq[np.ndarray], np.ndarray | None]:
    """The twin of `_merged`, pair by pair."""
    import numpy as np

    batch, num_tokens, _ = tokens.features.shape
    sizes = numpy_sizes_of(tokens)
    values = [tokens.features] if keys is None else [tokens.features, keys]
    evens, odds = range(0, num_tokens, 2), range(1, num_tokens, 2)
    means: list[list[np.ndarray]] = [[] for _ in values]
    places, counts = [], []
    step = np.zeros((batch, num_tokens), np.int64)
    for group, metric in enumerate(numpy_unit(values[-1])):
        likeness = metric @ metric.T
        pairs = {even: 1 + 2 * int(likeness[even, 1::2].argmax()) for even in evens}
        best = np.array([likeness[even, pairs[even]] for even in evens])
        order = [evens[place] for place in np.argsort(-best, kind="stable")]
        going = set(order[: num_tokens - count])
        members = {even: [even] for even in evens if even not in going}
        members |= {odd: [odd, *(e for e in sorted(going) if pairs[e] == odd)] for odd in odds}
        for number, rows in enumerate(members.values()):
            step[group, rows] = number
            size = sizes[group, rows]
            for found, given in zip(means, values, strict=True):
                found.append((given[group, rows] * size[:, None]).sum(0) / size.sum())
            places.append(tokens.places[group, rows].min())
            counts.append(size.sum())
    shape = (batch, count)
    features, *merged_keys = (np.array(found).reshape(*shape, -1) for found in means)
    merged = VisSeq(
        features=features,
        places=np.array(places).reshape(shape),
        sizes=np.array(counts).reshape(shape),
        provenance=None if tokens.provenance is None else numpy_followed(tokens.provenance, step),
    )
    return merged, merged_keys[0] if merged_keys else None
