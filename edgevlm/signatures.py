"""Inputs, outputs and state of every graph, from the spec alone: data, without torch.

`plan` shows them, capture follows them, and the manifest repeats them, so they are said once. The
order of the inputs is the order of the arguments of the module that is captured. A step graph has
one of two forms:

inplace   dynamic T; the graph writes new keys and values into the buffers that it reads
delta     T fixed; the graph returns the new rows, which the host commits
"""

from __future__ import annotations

import numpy as np

from edgevlm.model.spec import VlmSpec
from edgevlm_export.plan import GraphPlan
from edgevlm_runtime.manifest import StateGroup, StateTensor, TensorSpec

__all__ = ["GROUP", "delta_signature", "inplace_signature", "state_group", "vision_signature"]

GROUP = "context"
"""The one state group of a model whose layers all see the same rows."""


def vision_signature(spec: VlmSpec, grid: tuple[int, int], num_images: int | None) -> GraphPlan:
    """Pixels of pictures (or tiles) of one grid to their visual tokens; None: any number of them.

    A native-resolution picture comes as patches [rows, values] without a batch axis.
    """
    native = spec.vision.pixels == "patches"
    batch: int | str = 1 if native else "images" if num_images is None else num_images
    shape = spec.vision.pixels_shape(grid)
    tokens = spec.image_tokens(grid)
    return GraphPlan(
        name=f"vision_{grid[0]}x{grid[1]}" if native else "vision",
        inputs=(_float("pixels", *shape, source="pixels", batch=None if native else batch),),
        outputs=(_float("image_embeds", batch, tokens, spec.decoder.width),),
    )


def inplace_signature(spec: VlmSpec, capacity: int) -> GraphPlan:
    """The step of T rows, T dynamic, that extends its cache in place."""
    decoder = spec.decoder
    half = len(decoder.rope.inv_freq)
    state = state_group(spec, "inplace", capacity)
    return GraphPlan(
        name="step",
        inputs=(
            _float("inputs_embeds", 1, "rows", decoder.width, source="embeds"),
            _float("rope_cos", capacity, half, source="rope_cos"),
            _float("rope_sin", capacity, half, source="rope_sin"),
            TensorSpec(name="seqlens_k", dtype="int32", shape=(1,), source=f"last_slot:{GROUP}"),
            TensorSpec(
                name="total_sequence_length", dtype="int32", shape=(), source=f"total:{GROUP}"
            ),
            TensorSpec(
                name="logit_rows", dtype="int64", shape=("logit_rows",), source="logit_rows"
            ),
            *_state_inputs(state),
        ),
        outputs=(_float("logits", 1, "logit_rows", decoder.vocab_size), *_state_outputs(state)),
        defaults={"logit_rows": np.array([-1], np.int64)},
    )


def delta_signature(spec: VlmSpec, capacity: int, rows: int) -> GraphPlan:
    """The step of exactly `rows` rows that returns their keys and values.

    Short steps give logits of every row (they may verify a draft), long ones of one row.
    """
    decoder = spec.decoder
    half = len(decoder.rope.inv_freq)
    logit_rows = rows if rows <= 8 else 1
    state = state_group(spec, "delta", capacity)
    return GraphPlan(
        name=f"step_{rows}",
        inputs=(
            _float("inputs_embeds", 1, rows, decoder.width, source="embeds"),
            _float("rope_cos", rows, half, source="rope_cos"),
            _float("rope_sin", rows, half, source="rope_sin"),
            _float("attn_mask", 1, 1, rows, capacity + rows, source=f"mask:{GROUP}"),
            TensorSpec(name="logit_rows", dtype="int64", shape=(logit_rows,), source="logit_rows"),
            *_state_inputs(state),
        ),
        outputs=(
            _float("logits", 1, logit_rows, decoder.vocab_size),
            *_state_outputs(state, rows=rows),
        ),
    )


def state_group(spec: VlmSpec, form: str, capacity: int) -> StateGroup:
    """Keys and values of every layer; `form` is `inplace` or `delta`."""
    tensors = []
    for layer, layer_spec in enumerate(spec.decoder.layers):
        attention = layer_spec.attention
        for part in ("key", "value"):
            inplace = form == "inplace"
            tensors.append(
                StateTensor(
                    name=f"{part}.{layer}",
                    kind=f"kv_{form}",
                    input=f"past_key_values.{layer}.{part}" if inplace else f"past_{part}.{layer}",
                    output=f"present.{layer}.{part}" if inplace else f"new_{part}.{layer}",
                    dtype="float32",
                    shape=(1, attention.num_kv_heads, capacity, attention.head_dim),
                    layer=layer,
                )
            )
    return StateGroup(name=GROUP, capacity=capacity, tensors=tuple(tensors))


def _state_inputs(state: StateGroup) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=tensor.input,
            dtype=tensor.dtype,
            shape=tensor.shape,
            source=f"state:{tensor.name}",
        )
        for tensor in state.tensors
    ]


def _state_outputs(state: StateGroup, rows: int | None = None) -> list[TensorSpec]:
    """The whole buffers, or only their new rows."""
    return [
        TensorSpec(
            name=tensor.output,
            dtype=tensor.dtype,
            shape=tensor.shape
            if rows is None
            else (*tensor.shape[: tensor.axis], rows, *tensor.shape[tensor.axis + 1 :]),
        )
        for tensor in state.tensors
    ]


def _float(
    name: str, *shape: int | str, source: str = "", batch: int | str | None = None
) -> TensorSpec:
    full = shape if batch is None else (batch, *shape)
    return TensorSpec(name=name, dtype="float32", shape=full, source=source)
