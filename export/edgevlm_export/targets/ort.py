"""ONNX Runtime on CPU: fused contrib ops, any number of rows, the cache extended in place."""

from __future__ import annotations

import onnx_ir as ir

from edgevlm_export.forms import FORMS
from edgevlm_export.ops.op import MICROSOFT
from edgevlm_export.rewrites.fuse_bias import FuseBias
from edgevlm_export.rewrites.fuse_skip_norm import FuseSkipNorm
from edgevlm_export.rewrites.lower_ops import LowerOps
from edgevlm_export.rewrites.split_packed import SplitPacked
from edgevlm_export.targets.target import Target, host_engine, op_names

ORT = Target(
    name="ort",
    form=FORMS["ort"],
    ops={
        "": op_names(
            "Add Concat Conv Expand Gather LayerNormalization MatMul Mul Range Relu Reshape Shape",
            "SimplifiedLayerNormalization Slice Softmax Split Squeeze Transpose Unsqueeze",
        ),
        MICROSOFT: op_names(
            "BiasGelu FastGelu FusedMatMul Gelu GroupQueryAttention MultiHeadAttention QuickGelu",
            "RotaryEmbedding SkipLayerNormalization SkipSimplifiedLayerNormalization",
        ),
    },
    dtypes=frozenset({ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64}),
    static_shapes=False,
    rewrites=(
        SplitPacked(),
        LowerOps(("contrib", "standard")),
        FuseSkipNorm(),
        FuseBias(),
    ),
    engine=host_engine("MatMulAddFusion", "NchwcTransformer"),
)
