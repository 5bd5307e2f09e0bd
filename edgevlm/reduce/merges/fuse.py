"""Matching by several criteria (MCTF, arXiv 2403.10030): like, uninformative, small tokens fuse.

What a pair weighs is

    ((1 + cosine) / 2) ^ (1 / likeness)  *  (1 / a_i a_j) ^ (1 / attention)
                                         *  (1 / s_i s_j) ^ (1 / size)

with a the attention that a token receives and s what it was merged from; the exponents are one over
temperatures. All of it is taken in logarithms, in which a twentieth root of a small number loses
nothing. Of the tokens that go, half go from even to odd places, and the others from odd ones, with
what came to them, to the even ones that are left. Tokens fuse to means weighted by a and s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgevlm.document import Complaint
from edgevlm.reduce.members import own_columns, way_of_members
from edgevlm.reduce.order import first_place
from edgevlm.reduce.piece import Merge, Site, StaticClass, register
from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import (
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

NEVER = 1e9
"""Taken from the logarithm of a weight, it puts a pair behind all others."""
LEAST = 1e-6
"""Below this no number is taken to a logarithm."""


@register
class Fuse(Merge):
    """At most half of the tokens go in one stage; what is left of the even ones stands first."""

    name: ClassVar[str] = "fuse"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("encoder.layers",)
    ops: ClassVar[tuple[str, ...]] = ("ArgMax",)

    likeness: float = Field(1.0, gt=0, description="Temperature of the cosine of two tokens.")
    attention: float = Field(
        20.0, gt=0, description="Temperature of the attention that tokens receive."
    )
    size: float = Field(40.0, gt=0, description="Temperature of what tokens were merged from.")
    every: int = Field(
        1, ge=1, description="Attention of every so many rows counts, of 1 that of all of them."
    )
    both_ways: bool = Field(True, description="Half go from odd to even places; else none do.")

    @property
    def needs(self) -> frozenset[str]:
        """Attention of the layer."""
        return frozenset({"attention"})

    def macs(self, extent: Extent) -> int:
        """One half by the other, the sums of both ways, and the rows that ask."""
        even, odd, width = (extent.tokens + 1) // 2, extent.tokens // 2, extent.width + 2
        to_odd, to_even = self._numbers(extent.tokens - extent.kept)
        layer = extent.layers["own"]
        total = even * odd * (extent.width + 2 * width)
        total += layer.probe_macs(-(-layer.rows // self.every))
        for rows, gone in ((even, to_odd), (odd, to_even)):
            total += extent.chosen_macs(rows, rows - gone)
            total += extent.taken_macs(rows - gone, rows, width)
        return total

    def check(self, num_tokens: int, count: int) -> None:
        """Every token that goes has a partner."""
        if num_tokens - count > num_tokens // 2:
            raise Complaint(
                f"{num_tokens - count} of {num_tokens} tokens would be merged at once, and half "
                "is the most that find a partner",
                hint="keep more tokens, or merge in more steps",
            )

    def torch(self, view: View[Tensor], count: int) -> VisSeq[Tensor]:
        """Who goes where is two matrices of zeros and ones, one for each way."""
        import torch

        from edgevlm_export.ops import take_rows, top_rows

        tokens = view.tokens
        to_odd, to_even = self._numbers(tokens.features.shape[1] - count)
        sizes, received = sizes_of(tokens), self._received(view)
        matters = torch.log(received) / self.attention + torch.log(sizes) / self.size
        rows = unit(tokens.features)
        likeness = (1.0 + rows[:, ::2] @ rows[:, 1::2].mT) / 2.0
        pairs = torch.log(torch.maximum(likeness, torch.tensor(LEAST))) / self.likeness
        pairs = pairs - matters[:, ::2] - matters[:, 1::2].mT
        best, partner = pairs.max(-1)
        gone = (ranked(best) < to_odd).to(rows.dtype)
        goes_to = partner[:, None] == torch.arange(pairs.shape[2])[:, None]
        forth = goes_to.to(rows.dtype) * gone[:, None]
        # Nobody comes to an even one that is gone.
        best_back, partner = (pairs - NEVER * gone[..., None]).max(1)
        gone_back = (ranked(best_back) < to_even).to(rows.dtype)
        goes_to = partner[:, None] == torch.arange(pairs.shape[1])[:, None]
        back = goes_to.to(rows.dtype) * gone_back[:, None]
        # Weights and sizes travel as more features: all of them are sums.
        weights = received * sizes
        columns = own_columns(tokens)
        sums = torch.cat([*columns, tokens.features * weights, weights, sizes], -1)
        odd_sums = sums[:, 1::2] + forth @ sums[:, ::2]
        even_sums = sums[:, ::2] + back @ odd_sums
        # Tokens stand where the first of them stood.
        even_places, odd_places = tokens.places[:, ::2], tokens.places[:, 1::2]
        odd_places = first_place(odd_places, forth, even_places)
        even_places = first_place(even_places, back, odd_places)
        left, places = [], []
        for scores, num_gone, of_sums, of_places in (
            (best, to_odd, even_sums, even_places),
            (best_back, to_even, odd_sums, odd_places),
        ):
            if num_gone < of_sums.shape[1]:
                _, staying = top_rows(scores, num_gone, view.dense)
                left.append(take_rows(of_sums, staying, view.dense))
                places.append(picked(of_places, staying, dense=view.dense))
        sums, way = torch.cat(left, 1), None
        if columns:
            num_tokens = tokens.features.shape[1]
            way, sums = way_of_members(sums[..., :num_tokens] > 0), sums[..., num_tokens:]
        return VisSeq(
            features=sums[..., :-2] / sums[..., -2:-1],
            places=torch.cat(places, 1),
            sizes=sums[..., -1:].flatten(1),
            provenance=way,
        )

    def _received(self, view: View[Tensor]) -> Tensor:
        """The attention that tokens receive [B, N, 1], mean over heads and the rows that ask."""
        import torch

        from edgevlm_export.ops import probe_attention

        probe = view.probes["own"]
        q = probe.q[:, :: self.every]
        weights = torch.full((1, 1, q.shape[1]), 1.0 / (q.shape[1] * probe.num_heads))
        heads = probe.num_heads, probe.num_kv_heads
        found = patches(view, probe, probe_attention(q, probe.k, weights, *heads, probe.scale))
        return torch.maximum(found, torch.tensor(LEAST))[..., None]

    def numpy(self, view: View[np.ndarray], count: int) -> VisSeq[np.ndarray]:
        """Group by group, with the weights as they are defined."""
        import numpy as np

        tokens = view.tokens
        batch, num_tokens, _ = tokens.features.shape
        to_odd, to_even = self._numbers(num_tokens - count)
        all_sizes, all_received = numpy_sizes_of(tokens), self._numpy_received(view)
        features, places, counts = [], [], []
        way = np.zeros((batch, num_tokens), np.int64)
        for group in range(batch):
            size, received = all_sizes[group], all_received[group]
            rows = numpy_unit(tokens.features[group].astype(np.float64))
            informs, grown = (1 / received) / (1 / received).max(), (1 / size) / (1 / size).max()
            pairs = np.maximum((1 + rows @ rows.T) / 2, LEAST) ** (1 / self.likeness)
            pairs = pairs * np.outer(informs, informs) ** (1 / self.attention)
            pairs = pairs * np.outer(grown, grown) ** (1 / self.size)
            evens, odds = list(range(0, num_tokens, 2)), list(range(1, num_tokens, 2))
            members = {row: [row] for row in range(num_tokens)}
            for sources, targets, number in ((evens, odds, to_odd), (odds, evens, to_even)):
                if number == 0:
                    continue
                targets = [row for row in targets if row in members]
                partner = {row: targets[int(pairs[row, targets].argmax())] for row in sources}
                order = sorted(sources, key=lambda row: -pairs[row, partner[row]])
                for row in order[:number]:
                    members[partner[row]] += members.pop(row)
            for number, row in enumerate(sorted(members, key=lambda row: (row % 2, row))):
                merged = members[row]
                way[group, merged] = number
                weight = received[merged] * size[merged]
                mean = (tokens.features[group, merged] * weight[:, None]).sum(0) / weight.sum()
                features.append(mean)
                places.append(tokens.places[group, merged].min())
                counts.append(size[merged].sum())
        shape = (batch, count)
        return VisSeq(
            features=np.array(features).reshape(*shape, -1),
            places=np.array(places).reshape(shape),
            sizes=np.array(counts).reshape(shape),
            provenance=way,
        )

    def _numpy_received(self, view: View[np.ndarray]) -> np.ndarray:
        """The twin of `_received`, [B, N], row by row and head by head."""
        import numpy as np

        probe = view.probes["own"]
        q, k = (x.astype(np.float64) for x in (probe.q, probe.k))
        size = q.shape[2] // probe.num_heads
        shares = []
        for head in range(probe.num_heads):
            of_kv = head // (probe.num_heads // probe.num_kv_heads)
            keys = k[..., of_kv * size : (of_kv + 1) * size]
            for row in range(0, q.shape[1], self.every):
                asking = q[:, row, head * size : (head + 1) * size]
                logits = np.einsum("bd,bsd->bs", asking, keys) * probe.scale
                weights = np.exp(logits - logits.max(1, keepdims=True))
                shares.append(weights / weights.sum(1, keepdims=True))
        found: np.ndarray = np.maximum(numpy_patches(view, probe, np.mean(shares, 0)), LEAST)
        return found

    def _numbers(self, going: int) -> tuple[int, int]:
        """How many tokens go to odd places, and how many to even ones."""
        to_odd = going // 2 if self.both_ways else going
        return to_odd, going - to_odd
