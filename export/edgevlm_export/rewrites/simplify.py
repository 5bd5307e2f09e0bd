"""onnxsim over a graph, kept where every site survives it.

onnxsim folds constants and drops operations that do nothing. Its fusions are off: they merge nodes
of several sites, lose the value between them or invent nodes, and an NPU compiler does its own.
Weights stay out of its sight, as if they were graph inputs, so that it neither copies nor merges
them.
"""

from __future__ import annotations

import logging

import onnx_ir as ir
import onnxsim

from edgevlm_export.taps import tapped_sites

_SKIPPED = (
    "eliminate_consecutive_idempotent_ops",
    # A sum over an axis of one number would become a Squeeze without a name.
    "eliminate_nop_reduce",
    "fuse_add_bias_into_conv",
    "fuse_consecutive_mul",
    "fuse_consecutive_reshapes",
    "fuse_consecutive_slices",
    "fuse_consecutive_squeeze_unsqueeze",
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_qkv",
    # Two nodes that only change shapes would become a Reshape without a name.
    "fuse_reshape_family",
    "fuse_transpose_into_gemm",
)
_LARGE_BYTES = 1024

logger = logging.getLogger(__name__)


class Simplify(ir.passes.FunctionalPass):
    """The simplified graph, or the same graph where onnxsim loses a site or invents a node."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Simplify without the weights, then put them back."""
        stripped = model.clone()
        weights = _take_weights(stripped.graph)
        proto, is_valid = onnxsim.simplify(ir.to_proto(stripped), skipped_optimizers=_SKIPPED)
        simplified = ir.from_proto(proto)
        assert isinstance(simplified, ir.Model)
        _put_weights(simplified.graph, weights)
        # onnxsim leaves a report of what it did in place of ours.
        simplified.metadata_props.clear()
        simplified.metadata_props.update(model.metadata_props)
        simplified.meta.update(model.meta)
        known = {node.name for node in model.graph}
        is_same = is_valid and all(node.name in known for node in simplified.graph)
        if not is_same or tapped_sites(simplified) != tapped_sites(model):
            logger.warning("onnxsim loses sites of %s: kept as it is", model.graph.name)
            kept = model.clone()
            kept.meta.update(model.meta)
            return ir.passes.PassResult(kept, False)
        return ir.passes.PassResult(simplified, True)


def _take_weights(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Make large initializers inputs without a value."""
    taken: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > _LARGE_BYTES:
            taken[name] = value.const_value
            graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
    return taken


def _put_weights(graph: ir.Graph, weights: dict[str, ir.TensorProtocol]) -> None:
    for value in list(graph.inputs):
        if value.name in weights:
            graph.inputs.remove(value)
            value.const_value = weights[value.name]
            graph.register_initializer(value)
