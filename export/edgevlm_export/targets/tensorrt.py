"""TensorRT: standard ops in a strongly typed network, quantized by what stands in the graph.

A builder with strong typing takes every type from the ONNX file. QuantizeLinear and
DequantizeLinear then say what is multiplied: int8 and float8 on both sides, with one scale for
activations and one per channel for weights, and int4 weights in blocks of 64 or 128 that are
restored first. No scale has a zero point. Here such graphs are emulated, as those of `static` are.

Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
"""

from __future__ import annotations

from edgevlm_export.forms import FORMS
from edgevlm_export.targets.static import STATIC
from edgevlm_export.targets.target import Target, dtype_set

TENSORRT = Target(
    name="tensorrt",
    form=FORMS["tensorrt"],
    ops=STATIC.ops,
    dtypes=dtype_set("BOOL FLOAT FLOAT8E4M3FN INT4 INT8 INT64"),
    static_shapes=True,
    rewrites=STATIC.rewrites,
    engine=STATIC.engine,
)
