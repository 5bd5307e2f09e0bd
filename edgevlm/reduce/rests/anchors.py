"""What was not chosen becomes a few contextual tokens (VisionZip; DUET's local form).

Anchors are taken at even steps from the rest; every other token of the rest goes to the anchor
whose key is most like its own, and an anchor leaves as itself plus the mean of what came to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgevlm.reduce.members import GONE, way_of_merged
from edgevlm.reduce.piece import Rest, Site, StaticClass, register
from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import (
    mean_keys,
    numpy_mean_keys,
    numpy_patches,
    numpy_unit,
    patches,
    picked,
    ranked,
    unit,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.view import View


LAST = 1e9
"""Taken from a score, it puts a token behind all others."""


@register
class Anchors(Rest):
    """`share` of the tokens that leave are contextual, at least one."""

    name: ClassVar[str] = "anchors"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("encoder", "projector")
    ops: ClassVar[tuple[str, ...]] = ("ArgMax",)

    share: float = Field(0.156, gt=0, lt=1, description="Of the tokens that leave the stage.")
    pool: int | None = Field(
        None,
        ge=1,
        description="Only the best so many per anchor take part, and anchors go by score (DUET); "
        "absent: all of the rest, and anchors go by place (VisionZip).",
    )
    layer: int = Field(-1, le=-1, description="Whose keys say what is alike.")
    average: bool = Field(
        False, description="Leave as the mean of anchor and what came, and not as their sum."
    )

    @property
    def needs(self) -> frozenset[str]:
        """Keys of a layer."""
        return frozenset({"attention"})

    @property
    def layers(self) -> frozenset[int]:
        """The layer."""
        return frozenset({self.layer})

    def macs(self, extent: Extent) -> int:
        """Keys of the rest by those of the anchors, and the means of what came to each."""
        rows, width, anchors = extent.tokens, extent.width, extent.extra
        size = extent.layers[self.layer].attention.head_dim
        rest = self._size(anchors, rows - extent.kept + anchors)
        total = rest * anchors * (size + width) + extent.chosen_macs(rows, rest)
        if self.pool is not None:
            total += extent.chosen_macs(rest, anchors) + extent.taken_macs(rest + anchors, rows, 1)
        total += extent.taken_macs(rest + anchors, rows, size)
        return total + extent.taken_macs(rest + extent.kept, rows, width)

    def extra(self, keep: int, num_tokens: int) -> int:
        """The number of anchors."""
        return min(max(1, round(self.share * keep)), keep - 1)

    def torch(self, view: View[Tensor], scores: Tensor, kept: Tensor, extra: int) -> VisSeq[Tensor]:
        """Which token goes where is a matrix of zeros and ones."""
        import torch

        from edgevlm_export.ops import take_rows, top_rows

        tokens, probe = view.tokens, view.probes[self.layer]
        num_tokens = scores.shape[1]
        is_kept = (kept[:, :, None] == torch.arange(num_tokens)).to(scores.dtype).sum(1)
        size = self._size(extra, num_tokens - kept.shape[1])
        rest, _ = top_rows(scores - LAST * is_kept, size, view.dense)
        places = torch.tensor([place * max(1, size // extra) for place in range(extra)])
        if self.pool is None and view.dense:
            anchors = picked(rest, places.expand(rest.shape[0], -1), dense=True)
        elif self.pool is None:
            anchors = rest.index_select(1, places)
        else:
            by_score = take_rows(scores[..., None], rest, view.dense).flatten(1)
            is_anchor = (ranked(by_score)[:, :, None] == places).to(scores.dtype).sum(-1)
            chosen, _ = top_rows(is_anchor, extra, view.dense)
            anchors = picked(rest, chosen, dense=view.dense)
        keys = unit(patches(view, probe, mean_keys(probe, probe.k)))
        likeness = take_rows(keys, rest, view.dense) @ take_rows(keys, anchors, view.dense).mT
        goes = (likeness.argmax(-1, keepdim=True) == torch.arange(extra)).to(scores.dtype)
        is_anchor = (rest[:, :, None] == anchors[:, None]).to(scores.dtype).sum(-1, keepdim=True)
        weights = (goes * (1.0 - is_anchor)).mT
        came = weights.sum(-1, keepdim=True)
        mean = (
            weights
            @ take_rows(tokens.features, rest, view.dense)
            / torch.maximum(came, torch.ones(()))
        )
        context = take_rows(tokens.features, anchors, view.dense) + mean
        if self.average:
            context = context / (1.0 + (came > 0.5).to(scores.dtype))
        lead = torch.cat([kept, anchors], 1)
        is_traced = tokens.provenance is not None
        return VisSeq(
            features=torch.cat([take_rows(tokens.features, kept, view.dense), context], 1),
            places=lead,
            sizes=torch.cat([kept.to(scores.dtype) * 0.0 + 1.0, 1.0 + came.flatten(1)], 1),
            provenance=way_of_merged(lead, weights, rest, num_tokens) if is_traced else None,
        )

    def numpy(
        self, view: View[np.ndarray], scores: np.ndarray, kept: np.ndarray, extra: int
    ) -> VisSeq[np.ndarray]:
        """Token by token."""
        import numpy as np

        tokens, probe = view.tokens, view.probes[self.layer]
        keys = numpy_unit(numpy_patches(view, probe, numpy_mean_keys(probe, probe.k)))
        features, places, sizes = [], [], []
        way = np.full(scores.shape, GONE)
        for group, rows in enumerate(kept):
            rest = [row for row in range(scores.shape[1]) if row not in rows]
            by_score = sorted(rest, key=list(np.argsort(-scores[group], kind="stable")).index)
            pool = by_score[: self._size(extra, len(rest))]
            step = max(1, len(pool) // extra)
            in_turn = sorted(pool) if self.pool is None else pool
            anchors = sorted(in_turn[place * step] for place in range(extra))
            came: dict[int, list[int]] = {anchor: [] for anchor in anchors}
            for row in pool:
                if row not in came:
                    likeness = [keys[group, row] @ keys[group, anchor] for anchor in anchors]
                    came[anchors[int(np.argmax(likeness))]].append(row)
            for number, members in enumerate([*([row] for row in rows), *came.values()]):
                way[group, members] = number
            way[group, anchors] = len(rows) + np.arange(extra)
            context = []
            for anchor, members in came.items():
                token = tokens.features[group, anchor].astype(np.float64)
                if members:
                    token = token + tokens.features[group, members].mean(0)
                    token = token / 2 if self.average else token
                context.append(token)
            features.append(np.concatenate([tokens.features[group, rows], context]))
            places.append([*rows, *anchors])
            sizes.append([*np.ones(len(rows)), *(1 + len(members) for members in came.values())])
        return VisSeq(
            features=np.array(features),
            places=np.array(places),
            sizes=np.array(sizes),
            provenance=way,
        )

    def _size(self, extra: int, rest: int) -> int:
        """How many of the rest take part."""
        return rest if self.pool is None else min(rest, self.pool * extra)
