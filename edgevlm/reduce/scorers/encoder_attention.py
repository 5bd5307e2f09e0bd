"""Attention that a patch receives in the encoder: from the class token, or from every row.

FasterVLM, VisionZip and DUET score by the class token's (arXiv 2412.01818, 2412.04467). Towers
without one (SigLIP, Qwen) have what every row gives, as DUET does for Qwen2.5-VL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from edgevlm.reduce.piece import Scorer, Site, StaticClass, register
from edgevlm.reduce.view import numpy_patches, patches

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.seq import Probe
    from edgevlm.reduce.view import View


@register
class EncoderAttention(Scorer):
    """Softmax attention of one encoder layer, summed over heads."""

    name: ClassVar[str] = "encoder_attention"
    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("encoder.layers", "encoder", "projector")

    layer: int = Field(-1, le=-1, description="Which layer, counted from the end.")
    by: Literal["class", "all"] = Field("class", description="Whose attention counts.")
    heads: Literal["each", "one"] = Field(
        "each", description="Softmax head by head, or over all of them as one head."
    )
    instead: Literal["all"] | None = Field(
        None, description="For towers without a class token; absent: they are refused."
    )

    @property
    def needs(self) -> frozenset[str]:
        """Attention, and a class token where nothing may stand in for it."""
        strict = self.by == "class" and self.instead is None
        return frozenset({"attention", "class"} if strict else {"attention"})

    @property
    def layers(self) -> frozenset[int]:
        """The layer."""
        return frozenset({self.layer})

    def macs(self, extent: Extent) -> int:
        """One probe row, or all."""
        layer = extent.layers[self.layer]
        asking = 1 if self.by == "class" and extent.class_row else layer.rows
        return layer.probe_macs(asking, num_heads=None if self.heads == "each" else 1)

    def torch(self, view: View[Tensor]) -> Tensor:
        """Probe rows are one, or all."""
        import torch

        from edgevlm_export.ops import probe_attention

        probe = view.probes[self.layer]
        row = probe.class_row if self.by == "class" else None
        q = probe.q if row is None else probe.q[:, row : row + 1]
        heads, kv_heads, scale = self._heads(probe)
        weights = torch.full((1, 1, q.shape[1]), 1.0 / q.shape[1])
        return patches(view, probe, probe_attention(q, probe.k, weights, heads, kv_heads, scale))

    def numpy(self, view: View[np.ndarray]) -> np.ndarray:
        """Softmax of every query row by itself."""
        import numpy as np

        probe = view.probes[self.layer]
        heads, kv_heads, scale = self._heads(probe)
        asking = [probe.class_row] if self.by == "class" and probe.class_row is not None else None
        received = np.zeros(probe.k.shape[:2])
        rows = range(probe.q.shape[1]) if asking is None else asking
        for head in range(heads):
            of_q = probe.q.reshape(*probe.q.shape[:2], heads, -1)[:, :, head]
            kv_head = head // (heads // kv_heads)
            of_k = probe.k.reshape(*probe.k.shape[:2], kv_heads, -1)[:, :, kv_head]
            for row in rows:
                logits = np.einsum("bd,bsd->bs", of_q[:, row], of_k) * scale
                weights = np.exp(logits - logits.max(1, keepdims=True))
                received += weights / weights.sum(1, keepdims=True) / len(rows)
        return numpy_patches(view, probe, received)

    def _heads(self, probe: Probe[Tensor] | Probe[np.ndarray]) -> tuple[int, int, float]:
        """Heads of the queries and of the keys, and the scale of their products."""
        if self.heads == "each":
            return probe.num_heads, probe.num_kv_heads, probe.scale
        return 1, 1, float(probe.q.shape[2]) ** -0.5
