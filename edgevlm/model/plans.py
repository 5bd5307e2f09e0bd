"""The graphs that a model becomes, as data: inputs, outputs and state, from the spec alone.

Two forms of the step graph, one sequence length each. `inplace`: any number of rows, the graph
extends the cache it reads. `delta`: a fixed number of rows, what may be seen is an additive mask,
and the graph returns the new rows for the host to commit.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from edgevlm.errors import ModelError
from edgevlm.model.spec import AttentionSpec, VlmSpec
from edgevlm_export.forms import FORMS
from edgevlm_export.plan import GraphPlan
from edgevlm_runtime.manifest import StateGroup, StateTensor, TensorSpec

GROUP = "main"
# A verify call wants logits of all its rows; a longer call is a piece of a prompt.
MAX_VERIFY_ROWS = 8
# What caches can be quantized to: GroupQueryAttention has no float8 on a CPU, and standard ops pack
# no two int4 in a byte.
INPLACE_CACHES = FORMS["ort"].caches
DELTA_CACHES = FORMS["static"].caches


def vision_plan(spec: VlmSpec, grid: tuple[int, int], num_images: int | None = None) -> GraphPlan:
    """Pixels of pictures (or tiles) of a grid to their rows; without `num_images`, any number.

    Where positions rotate there is one picture a call.
    """
    vision = spec.vision
    name = "vision" if len(vision.grids) == 1 else "vision_{}x{}".format(*grid)
    batch = 1 if vision.position == "rotary" else num_images or "N"
    pixels = TensorSpec(
        name="pixels",
        dtype="float32",
        shape=(batch, *vision.pixels_shape(grid)),
        source="pixels",
    )
    rows = TensorSpec(
        name="image_embeds",
        dtype="float32",
        shape=(batch, spec.image_tokens(grid), spec.decoder.width),
    )
    return GraphPlan(name=name, inputs=(pixels,), outputs=(rows,))


def inplace_plan(spec: VlmSpec, capacity: int, name: str = "step") -> GraphPlan:
    """The step that extends its cache: T rows of this call, after the used slots."""
    _check_cache(spec, INPLACE_CACHES, "a step that extends its cache")
    decoder = spec.decoder
    rope = (capacity, len(decoder.rope.inv_freq))
    inputs = (
        _float("inputs_embeds", (1, "T", decoder.width), "embeds"),
        _float("rope_cos", rope, "rope_cos"),
        _float("rope_sin", rope, "rope_sin"),
        TensorSpec(name="seqlens_k", dtype="int32", shape=(1,), source=f"last_slot:{GROUP}"),
        TensorSpec(name="total_sequence_length", dtype="int32", shape=(), source=f"total:{GROUP}"),
        TensorSpec(name="logit_rows", dtype="int64", shape=("R",), source="logit_rows"),
    )
    state = inplace_state(spec, capacity).tensors
    return GraphPlan(
        name=name,
        inputs=(*inputs, *(_state_input(tensor) for tensor in state)),
        outputs=(
            _float("logits", (1, "R", decoder.vocab_size)),
            *(_state_output(tensor, tensor.shape) for tensor in state),
        ),
        defaults={"logit_rows": np.array([-1], dtype=np.int64)},
    )


def step_name(phases: Collection[str]) -> str:
    """The name of a dynamic step graph that serves these phases."""
    return "prefill" if set(phases) == {"prefill"} else "step"


def delta_plan(spec: VlmSpec, capacity: int, num_rows: int) -> GraphPlan:
    """The step of `num_rows` rows that returns the new rows of its cache."""
    _check_cache(spec, DELTA_CACHES, "a static step")
    decoder = spec.decoder
    narrow = [
        index
        for index, layer in enumerate(decoder.layers)
        if layer.attention.window is not None and layer.attention.window < capacity
    ]
    if narrow:
        window = decoder.layers[narrow[0]].attention.window
        raise ModelError(
            f"decoder.layers.{narrow[0]} sees a window of {window} rows, and the static form has "
            f"one mask over all {capacity} slots",
            hint=f"lower the context to at most {window} tokens, or choose a target with windows",
        )
    rope = (num_rows, len(decoder.rope.inv_freq))
    inputs = (
        _float("inputs_embeds", (1, num_rows, decoder.width), "embeds"),
        _float("rope_cos", rope, "rope_cos"),
        _float("rope_sin", rope, "rope_sin"),
        _float("attn_mask", (1, 1, num_rows, capacity + num_rows), f"mask:{GROUP}"),
        TensorSpec(
            name="logit_rows",
            dtype="int64",
            shape=(num_logit_rows(num_rows),),
            source="logit_rows",
        ),
    )
    state = delta_state(spec, capacity).tensors
    news = (
        _state_output(tensor, (*tensor.shape[:2], num_rows, tensor.shape[3])) for tensor in state
    )
    return GraphPlan(
        name=f"step_{num_rows}",
        inputs=(*inputs, *(_state_input(tensor) for tensor in state)),
        outputs=(_float("logits", (1, num_logit_rows(num_rows), decoder.vocab_size)), *news),
    )


def num_logit_rows(num_rows: int) -> int:
    """Rows of logits of a static step: all of a verify call, the last of a piece of a prompt."""
    return num_rows if num_rows <= MAX_VERIFY_ROWS else 1


def inplace_state(spec: VlmSpec, capacity: int) -> StateGroup:
    """The cache of the `inplace` form, named as onnxruntime-genai names it."""
    return _state(spec, capacity, "kv_inplace", "past_key_values.{}.{}", "present.{}.{}")


def delta_state(spec: VlmSpec, capacity: int) -> StateGroup:
    """The cache of the `delta` form."""
    return _state(spec, capacity, "kv_delta", "past_{1}.{0}", "new_{1}.{0}")


def _state(spec: VlmSpec, capacity: int, kind: str, name: str, output: str) -> StateGroup:
    """Keys and values of every layer."""
    return StateGroup(
        name=GROUP,
        capacity=capacity,
        tensors=tuple(
            StateTensor(
                name=f"{part}.{index}",
                kind=kind,
                input=name.format(index, part),
                output=output.format(index, part),
                dtype=_stored(layer.attention)[0],
                shape=(1, layer.attention.num_kv_heads, capacity, _stored(layer.attention)[1]),
                layer=index,
            )
            for index, layer in enumerate(spec.decoder.layers)
            for part in ("key", "value")
        ),
    )


def _stored(attention: AttentionSpec) -> tuple[str, int]:
    """The dtype and the last dimension of a layer's cache."""
    if attention.kv is None:
        return "float32", attention.head_dim
    return attention.kv.stored_dtype, attention.kv.stored_width(attention.head_dim)


def _check_cache(spec: VlmSpec, dtypes: tuple[str, ...], form: str) -> None:
    """Refuse a cache in a dtype that a form of the step has no ops for."""
    for index, layer in enumerate(spec.decoder.layers):
        kv = layer.attention.kv
        if kv is not None and kv.dtype not in dtypes:
            raise ModelError(
                f"decoder.layers.{index} has a cache of {kv.dtype}, which {form} cannot keep",
                hint=f"choose {' or '.join(dtypes)}, or another target",
            )


def _state_input(tensor: StateTensor) -> TensorSpec:
    """The graph input that a state tensor feeds."""
    return TensorSpec(
        name=tensor.input, dtype=tensor.dtype, shape=tensor.shape, source=f"state:{tensor.name}"
    )


def _state_output(tensor: StateTensor, shape: tuple[int | str, ...]) -> TensorSpec:
    """The graph output that renews a state tensor, or brings rows of it."""
    return TensorSpec(name=tensor.output, dtype=tensor.dtype, shape=shape)


def _float(name: str, shape: tuple[int | str, ...], source: str = "") -> TensorSpec:
    """A float32 input or output."""
    return TensorSpec(name=name, dtype="float32", shape=shape, source=source)
