"""The ops our modules are made of: eager torch is the reference, a graph keeps each as one node."""

from __future__ import annotations

from edgevlm_export.ops.activate import ACTIVATIONS, activate
from edgevlm_export.ops.attention import attention
from edgevlm_export.ops.bottleneck_attention import bottleneck_attention
from edgevlm_export.ops.cached_attention import cached_attention
from edgevlm_export.ops.cover_rows import cover_rows
from edgevlm_export.ops.dpp_rows import dpp_rows
from edgevlm_export.ops.gated import gated
from edgevlm_export.ops.heads import CLOSED, causal_mask
from edgevlm_export.ops.kept_rows import kept_rows
from edgevlm_export.ops.layer_norm import layer_norm
from edgevlm_export.ops.logits import logits
from edgevlm_export.ops.masked_attention import masked_attention
from edgevlm_export.ops.probe_attention import probe_attention
from edgevlm_export.ops.probe_heads import probe_heads
from edgevlm_export.ops.quant_linear import dequantized, num_groups, quant_linear
from edgevlm_export.ops.rms_norm import rms_norm
from edgevlm_export.ops.rotary import rotary
from edgevlm_export.ops.spread_rows import spread_rows
from edgevlm_export.ops.take_rows import take_rows
from edgevlm_export.ops.top_rows import top_rows

__all__ = [
    "ACTIVATIONS",
    "CLOSED",
    "activate",
    "attention",
    "bottleneck_attention",
    "cached_attention",
    "causal_mask",
    "cover_rows",
    "dequantized",
    "dpp_rows",
    "gated",
    "kept_rows",
    "layer_norm",
    "logits",
    "masked_attention",
    "num_groups",
    "probe_attention",
    "probe_heads",
    "quant_linear",
    "rms_norm",
    "rotary",
    "spread_rows",
    "take_rows",
    "top_rows",
]
