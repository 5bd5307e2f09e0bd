"""Throw-away heads that teach the vision encoder the dense targets."""

from __future__ import annotations

import torch
from torch import nn

from edgevlm.scenes.dense import IGNORED, NUM_COUNTS, NUM_PRESENCES, PATCH_TARGETS


class DenseHeads(nn.Module):
    """One linear map over the patches for all patch targets, one over the class token."""

    def __init__(self, width: int) -> None:
        """Heads over hidden states of this width."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patches = nn.Linear(width, sum(PATCH_TARGETS.values()))
        self.picture = nn.Linear(width, NUM_PRESENCES + NUM_COUNTS)

    def loss(
        self,
        hidden: torch.Tensor,
        pooled: torch.Tensor,
        patch_targets: torch.Tensor,
        picture_targets: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Summed loss, and for each target the share that is right.

        `hidden` is the encoder's last layer with the class token first, `pooled` its normed class
        token.
        """
        logits = self.patches(self.norm(hidden[:, 1:]))
        total = logits.new_zeros((), dtype=torch.float32)
        right: dict[str, float] = {}
        parts = logits.split(list(PATCH_TARGETS.values()), dim=-1)
        for column, (name, part) in enumerate(zip(PATCH_TARGETS, parts, strict=True)):
            targets = patch_targets[..., column]
            counted = targets != IGNORED
            if name in ("owner", "character"):
                # Background fills most of a picture: count all that is not, and a tenth of it.
                weights = torch.where(targets > 0, 1.0, 0.1)
            else:
                weights = counted.float()
            picked = weights > 0
            losses = nn.functional.cross_entropy(
                part[picked].float(), targets[picked].clamp(min=0), reduction="none"
            )
            scale = _WEIGHTS.get(name, 1.0)
            total = total + scale * (losses * weights[picked]).sum() / weights.sum().clamp(min=1)
            if not torch.is_grad_enabled() or name in _WATCHED:
                found = (targets > 0) if name in ("owner", "character") else counted
                hits = part[found].argmax(-1) == targets[found]
                right[name] = hits.float().mean().item() if hits.numel() else 0.0
        picture = self.picture(pooled).float()
        present, count = picture.split((NUM_PRESENCES, NUM_COUNTS), dim=-1)
        total = total + nn.functional.binary_cross_entropy_with_logits(
            present, picture_targets[:, :-1]
        )
        total = total + 0.5 * nn.functional.cross_entropy(count, picture_targets[:, -1].long())
        right["count"] = (count.argmax(-1) == picture_targets[:, -1]).float().mean().item()
        return total, right


_WATCHED = ("owner", "size", "character", "left")
_WEIGHTS = {
    "owner": 2.0,
    "character": 2.0,
    "left": 0.5,
    "top": 0.5,
    "right": 0.5,
    "bottom": 0.5,
    "position": 0.5,
}
