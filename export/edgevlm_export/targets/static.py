"""Fixed shapes and standard ops only: what NPU compilers take, and what ONNX Runtime runs here."""

from __future__ import annotations

from edgevlm_export.forms import FORMS
from edgevlm_export.rewrites.lower_ops import LowerOps
from edgevlm_export.rewrites.simplify import Simplify
from edgevlm_export.rewrites.split_packed import SplitPacked
from edgevlm_export.targets.target import Target, dtype_set, host_engine, op_names

STATIC = Target(
    name="static",
    form=FORMS["static"],
    ops={
        "": op_names(
            # Log: a merged token's key weighs by the logarithm of its size.
            "Abs Add And ArgMax Cast Concat Conv DequantizeLinear Div Equal Erf Expand Gather",
            "Gemm Greater GreaterOrEqual LayerNormalization Less Log MatMul Max Min Mul Or",
            "QuantizeLinear ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Sigmoid Slice",
            "Softmax Split Sqrt Sub Tanh TopK Transpose Unsqueeze Where",
        ),
    },
    dtypes=dtype_set("BOOL FLOAT FLOAT8E4M3FN FLOAT8E5M2 INT4 INT8 INT16 INT64"),
    static_shapes=True,
    rewrites=(SplitPacked(), LowerOps(("standard",)), Simplify()),
    engine=host_engine("MatMulAddFusion", "NchwcTransformer", "SkipLayerNormFusion", emulates=True),
)
