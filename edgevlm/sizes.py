"""How large a model is: its numbers by part, and the tensors of one call, from the spec alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgevlm.model.spec import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    ProjectorSpec,
    VisionSpec,
    VlmSpec,
)
from edgevlm.quant.sites import linear_sites
from edgevlm.reduce.extent import extent_of

__all__ = [
    "Parameters",
    "decoder_activations",
    "learned_bytes",
    "parameters",
    "shares_table",
    "table_bytes",
    "vision_activations",
    "weight_bytes",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Numbers of each part; `head` is 0 where it is the embedding."""

    vision: int
    projector: int
    embedding: int
    layers: int
    head: int

    @property
    def total(self) -> int:
        """Numbers of the checkpoint."""
        return self.vision + self.projector + self.embedding + self.layers + self.head


def parameters(spec: VlmSpec) -> Parameters:
    """Count the numbers of a model."""
    decoder = spec.decoder
    table = decoder.vocab_size * decoder.width
    return Parameters(
        vision=_vision(spec.vision),
        projector=_projector(spec.projector),
        embedding=table,
        layers=sum(_layer(layer, decoder.width) for layer in decoder.layers)
        + _norm(decoder.norm, decoder.width),
        head=0 if decoder.tied else table,
    )


def shares_table(spec: VlmSpec, form: str) -> bool:
    """Whether the head of a step in this form reads the bytes of the embedding table.

    A quantized head does where both have the same weights and the same layout, which only steps
    that extend their cache have.
    """
    head = spec.schemes.get("decoder.head")
    if head is None or not spec.head_is_table:
        return spec.head_is_table
    activations = head.activations
    is_integer = activations is not None and activations.dtype == "int8"
    has_blocks = activations is None or not is_integer or activations.scales == "block"
    return form == "inplace" and has_blocks


def weight_bytes(spec: VlmSpec, *roots: str) -> int:
    """Bytes of the weights under these roots of sites (`vision`, `prefill.layers`), as stored."""
    total = 0
    for site, linear in linear_sites(spec).items():
        for root in roots:
            is_prompt = root.startswith("prefill")
            named = site.replace("decoder.", "prefill.", 1) if is_prompt else site
            if named == root or named.startswith(f"{root}."):
                scheme = spec.schemes.get(named)
                size = linear.rows, linear.columns
                total += 4 * linear.numbers if scheme is None else scheme.weights.nbytes(*size)
    return total


def learned_bytes(spec: VlmSpec) -> int:
    """Bytes of what a reduction has learned, which is float32."""
    if spec.reduction is None:
        return 0
    _, stages = spec.reduction.stages[0]
    numbers = sum(
        math.prod(weight.shape)
        for stage in stages
        for piece in stage.pieces
        for weight in piece.weights(extent_of(spec, stage)).values()
    )
    if spec.reduction.fusion is not None:
        layer = spec.decoder.layers[0]
        numbers += spec.reduction.fusion.layers * _layer(layer, spec.decoder.width)
    if spec.reduction.remember is not None:
        width, features = spec.decoder.width, spec.remembered_width
        places = spec.reduction.remember.decoder_layers(len(spec.decoder.layers))
        matrices = 2 * width * width + 2 * features * width
        numbers += len(places) * (matrices + 2 * width + 2 * features + 1)
    return int(4 * numbers)


def table_bytes(spec: VlmSpec) -> int:
    """Bytes of the embedding table."""
    decoder = spec.decoder
    if spec.table is None:
        return 4 * decoder.vocab_size * decoder.width
    return spec.table.weights.nbytes(decoder.vocab_size, decoder.width)


def vision_activations(spec: VlmSpec, grid: tuple[int, int]) -> int:
    """Numbers alive at once in the widest layer for one picture of that grid."""
    vision = spec.vision
    rows = grid[0] * grid[1] + int(vision.class_token)
    return max(_alive(layer, vision.width, rows, rows) for layer in vision.layers)


def decoder_activations(spec: VlmSpec, rows: int, capacity: int) -> int:
    """Numbers alive at once in the widest layer, or at the head, for a call of that many rows."""
    decoder = spec.decoder
    widest = max(_alive(layer, decoder.width, rows, capacity + rows) for layer in decoder.layers)
    return max(widest, rows * decoder.width + decoder.vocab_size)


def _alive(layer: LayerSpec, width: int, rows: int, seen: int) -> int:
    """The residual, and the larger of attention (with its scores) and MLP."""
    attention, mlp = layer.attention, layer.mlp
    scores = attention.num_heads * rows * seen
    heads = rows * (2 * attention.q_width + 2 * attention.kv_width) + scores
    hidden = rows * mlp.width * (2 if mlp.gated else 1)
    return 2 * rows * width + max(heads, hidden)


def _vision(spec: VisionSpec) -> int:
    embed = spec.width * spec.patch_width + (spec.width if spec.patch_bias else 0)
    if spec.class_token:
        embed += spec.width
    if spec.position != "rotary":
        embed += spec.width * spec.num_positions
    return (
        embed
        + sum(_norm(norm, spec.width) for norm in (spec.pre_norm, spec.norm) if norm is not None)
        + sum(_layer(layer, spec.width) for layer in spec.layers)
    )


def _projector(spec: ProjectorSpec) -> int:
    square = spec.in_width * spec.merge**2
    norm = 0 if spec.norm is None else _norm(spec.norm, spec.in_width)
    if not spec.hidden_width:
        return norm + _linear(square, spec.out_width, spec.bias)
    return (
        norm
        + _linear(square, spec.hidden_width, spec.bias)
        + _linear(spec.hidden_width, spec.out_width, spec.bias)
    )


def _layer(spec: LayerSpec, width: int) -> int:
    return (
        _norm(spec.norm1, width)
        + _norm(spec.norm2, width)
        + _attention(spec.attention, width)
        + _mlp(spec.mlp, width)
    )


def _attention(spec: AttentionSpec, width: int) -> int:
    norms = (spec.q_norm, spec.k_norm)
    return (
        _linear(width, spec.q_width + 2 * spec.kv_width, spec.qkv_bias)
        + _linear(spec.q_width, width, spec.out_bias)
        + sum(_norm(norm, spec.head_dim) for norm in norms if norm is not None)
    )


def _mlp(spec: MlpSpec, width: int) -> int:
    up = _linear(width, spec.width, spec.bias)
    return up * (2 if spec.gated else 1) + _linear(spec.width, width, spec.bias)


def _norm(spec: NormSpec, width: int) -> int:
    return width * (2 if spec.kind == "layer" else 1)


def _linear(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)
