"""What is asked of the sites of a graph, as the schemes of a model say it."""

from __future__ import annotations

from edgevlm.audit.precision import Precision
from edgevlm.model.plans import reads_prompts
from edgevlm.model.spec import KvQuant, VlmSpec
from edgevlm.quant.spec import DTYPE_BITS, Scheme
from edgevlm_export.ops.quant_product import CHANNEL_BLOCK
from edgevlm_runtime.manifest import GraphSpec

__all__ = ["asked_of", "precision_of"]

_VISION = ("vision.", "projector.")
_WIDE = 16  # bits of activations that are floats where products are not emulated


def asked_of(spec: VlmSpec, graph: GraphSpec, *, emulated: bool) -> dict[str, Precision]:
    """What is asked of the sites of a graph; a decoder for prompts has the sites of the other.

    `emulated` says that the graph is made for a device that this host is not.
    """
    if graph.role == "vision":
        own = {site: scheme for site, scheme in spec.schemes.items() if site.startswith(_VISION)}
        return {site: precision_of(scheme, emulated=emulated) for site, scheme in own.items()}
    root = "prefill." if spec.has_prefill and reads_prompts(graph.phases) else "decoder."
    asked = {
        site.replace(root, "decoder.", 1): precision_of(scheme, emulated=emulated)
        for site, scheme in spec.schemes.items()
        if site.startswith((root, "decoder.head"))
    }
    for index, layer in enumerate(spec.decoder.layers):
        if layer.attention.kv is not None:
            site = f"decoder.layers.{index}.attention.core"
            asked[site] = _of_cache(layer.attention.kv, emulated=emulated)
    return asked


def precision_of(scheme: Scheme, *, emulated: bool) -> Precision:
    """The precision that a scheme asks for.

    Kernels that multiply integers know none of 16 bits: there activations are asked as floats,
    which is what they become.
    """
    weights, activations = scheme.weights, scheme.activations
    if activations is None or (DTYPE_BITS[activations.dtype] == _WIDE and not emulated):
        return Precision(
            weights=weights.dtype,
            weight_granularity=weights.granularity,
            activations="float32",
            emulated=emulated,
        )
    block = f"group:{weights.group_size or CHANNEL_BLOCK}"
    shared = {"static": "tensor", "tensor": "tensor", "token": "token", "block": block}
    return Precision(
        weights=weights.dtype,
        weight_granularity=weights.granularity,
        activations=activations.dtype,
        activation_granularity=shared[activations.scales],
        dynamic=not activations.is_static,
        emulated=emulated,
    )


def _of_cache(kv: KvQuant, *, emulated: bool) -> Precision:
    """The precision that a cache asks for; standard ops take its scales to the queries."""
    return Precision(
        activations="float32",
        state=kv.dtype,
        state_granularity="" if emulated else kv.granularity,
        emulated=emulated,
    )
