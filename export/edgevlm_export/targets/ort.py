"""ONNX Runtime on CPU: fused contrib ops, any number of rows, the cache extended in place."""

from __future__ import annotations

from edgevlm_export.forms import FORMS
from edgevlm_export.ops.op import MICROSOFT
from edgevlm_export.rewrites.fuse_bias import FuseBias
from edgevlm_export.rewrites.fuse_skip_norm import FuseSkipNorm
from edgevlm_export.rewrites.join_products import JoinProducts
from edgevlm_export.rewrites.lower_ops import LowerOps
from edgevlm_export.rewrites.split_packed import SplitPacked
from edgevlm_export.targets.target import Target, dtype_set, host_engine, op_names

ORT = Target(
    name="ort",
    form=FORMS["ort"],
    ops={
        "": op_names(
            "Abs Add And ArgMax BitShift BitwiseAnd Cast Clip Concat Conv DequantizeLinear Div",
            # Log: a merged token's key weighs by the logarithm of its size.
            "Equal Expand Gather GatherND Greater GreaterOrEqual LayerNormalization Less Log",
            "MatMul Max Min Mul NonZero Or QuantizeLinear Range ReduceMax ReduceMean ReduceMin",
            "ReduceSum Relu Reshape Round ScatterND Shape SimplifiedLayerNormalization Slice",
            "Softmax Split Sqrt Squeeze Sub Tanh TopK Transpose Unsqueeze Where",
        ),
        MICROSOFT: op_names(
            "BiasGelu DynamicQuantizeMatMul FastGelu FusedMatMul Gelu GroupQueryAttention",
            "MatMulIntegerToFloat MatMulNBits MultiHeadAttention QuickGelu RotaryEmbedding",
            "SkipSimplifiedLayerNormalization",
        ),
    },
    dtypes=dtype_set("BOOL FLOAT INT8 INT32 INT64 UINT8"),
    static_shapes=False,
    rewrites=(
        SplitPacked(),
        JoinProducts(),
        LowerOps(("contrib", "standard")),
        FuseSkipNorm(),
        FuseBias(),
    ),
    engine=host_engine("MatMulAddFusion", "NchwcTransformer", "SkipLayerNormFusion"),
)
