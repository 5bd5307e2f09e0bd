"""All ops, by the name of their node."""

from __future__ import annotations

from edgevlm_export.ops.activate import OP as ACTIVATE
from edgevlm_export.ops.attention import OP as ATTENTION
from edgevlm_export.ops.bottleneck_attention import OP as BOTTLENECK_ATTENTION
from edgevlm_export.ops.cached_attention import OP as CACHED_ATTENTION
from edgevlm_export.ops.cover_rows import OP as COVER_ROWS
from edgevlm_export.ops.dpp_rows import OP as DPP_ROWS
from edgevlm_export.ops.gated import OP as GATED
from edgevlm_export.ops.kept_rows import OP as KEPT_ROWS
from edgevlm_export.ops.layer_norm import OP as LAYER_NORM
from edgevlm_export.ops.linear import OP as LINEAR
from edgevlm_export.ops.logits import OP as LOGITS
from edgevlm_export.ops.masked_attention import OP as MASKED_ATTENTION
from edgevlm_export.ops.probe_attention import OP as PROBE_ATTENTION
from edgevlm_export.ops.probe_heads import OP as PROBE_HEADS
from edgevlm_export.ops.quant_linear import OP as QUANT_LINEAR
from edgevlm_export.ops.rms_norm import OP as RMS_NORM
from edgevlm_export.ops.rotary import OP as ROTARY
from edgevlm_export.ops.spread_rows import OP as SPREAD_ROWS
from edgevlm_export.ops.take_rows import OP as TAKE_ROWS
from edgevlm_export.ops.top_rows import OP as TOP_ROWS

OPS = {
    op.name: op
    for op in (
        ACTIVATE,
        ATTENTION,
        BOTTLENECK_ATTENTION,
        CACHED_ATTENTION,
        COVER_ROWS,
        DPP_ROWS,
        GATED,
        KEPT_ROWS,
        LAYER_NORM,
        LINEAR,
        LOGITS,
        MASKED_ATTENTION,
        PROBE_ATTENTION,
        PROBE_HEADS,
        QUANT_LINEAR,
        RMS_NORM,
        ROTARY,
        SPREAD_ROWS,
        TAKE_ROWS,
        TOP_ROWS,
    )
}
