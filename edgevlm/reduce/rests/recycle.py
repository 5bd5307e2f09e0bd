"""The best of what was pruned is put together into a few tokens (SparseVLM, arXiv 2410.04417).

Of the tokens that are not kept, a share of the best scores takes part; clusters of them by density
leave as means, behind the tokens that are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgevlm.reduce.density import density_clusters, numpy_density_clusters
from edgevlm.reduce.piece import Rest, Site, StaticClass, register
from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import picked

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.view import View

LAST = 1e9
"""Taken from a score, it puts a token behind all others."""


@register
class Recycle(Rest):
    """One token for every `per_cluster` that take part, and one more."""

    name: ClassVar[str] = "recycle"
    static_class: ClassVar[StaticClass] = "S2"
    sites: ClassVar[tuple[Site, ...]] = ("encoder", "projector", "decoder")

    share: float = Field(0.3, gt=0, le=1, description="Of the pruned tokens, how many take part.")
    per_cluster: int = Field(10, ge=2, description="Tokens that take part, for each one made.")
    neighbours: int = Field(5, ge=2, description="How many of the nearest say how dense it is.")

    def extra(self, keep: int, num_tokens: int) -> int:
        """The clusters: fewer tokens kept are more pruned, so their number is found in steps."""
        found = 0
        while found < keep - 1:
            wanted = self._size(num_tokens - keep + found) // self.per_cluster + 1
            if wanted <= found:
                break
            found = min(wanted, keep - 1)
        return found

    def torch(self, view: View[Tensor], scores: Tensor, kept: Tensor, extra: int) -> VisSeq[Tensor]:
        """Which token goes where is a matrix of zeros and ones."""
        import torch

        from edgevlm_export.ops import take_rows, top_rows

        features, num_tokens = view.tokens.features, scores.shape[1]
        is_kept = (kept[:, :, None] == torch.arange(num_tokens)).to(scores.dtype).sum(1)
        size = self._size(num_tokens - kept.shape[1])
        best, _ = top_rows(scores - LAST * is_kept, size, view.dense)
        rows = take_rows(features, best, view.dense)
        centres, members = density_clusters(rows, extra, self.neighbours, view.dense)
        sizes = members.sum(-1)
        return VisSeq(
            features=torch.cat(
                [take_rows(features, kept, view.dense), members @ rows / sizes[..., None]], 1
            ),
            places=torch.cat([kept, picked(best, centres, dense=view.dense)], 1),
            sizes=torch.cat([kept.to(scores.dtype) * 0.0 + 1.0, sizes], 1),
        )

    def numpy(
        self, view: View[np.ndarray], scores: np.ndarray, kept: np.ndarray, extra: int
    ) -> VisSeq[np.ndarray]:
        """Cluster by cluster."""
        import numpy as np

        features, places, sizes = [], [], []
        for group, rows in enumerate(kept):
            tokens = view.tokens.features[group]
            order = [row for row in np.argsort(-scores[group], kind="stable") if row not in rows]
            best = np.sort(order[: self._size(len(order))])
            centres, members = numpy_density_clusters(tokens[None, best], extra, self.neighbours)
            groups = [best[np.flatnonzero(row)] for row in members[0]]
            made = [tokens[group].mean(0) for group in groups]
            features.append(np.concatenate([tokens[rows], made]))
            places.append([*rows, *best[centres[0]]])
            sizes.append([*np.ones(len(rows)), *map(len, groups)])
        return VisSeq(features=np.array(features), places=np.array(places), sizes=np.array(sizes))

    def _size(self, pruned: int) -> int:
        """How many of the pruned take part."""
        return min(pruned, int(self.share * pruned) + 1)
