"""The graphs that a model becomes, as data: inputs, outputs and state, from the spec alone.

Two forms of the step graph, one sequence length each. `inplace`: any number of rows, the graph
extends the cache it reads. `delta`: a fixed number of rows, what may be seen is an additive mask,
and the graph returns the new rows for the host to commit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import numpy as np

from edgevlm.errors import ModelError
from edgevlm.model.spec import AttentionSpec, VlmSpec
from edgevlm.reduce.fusion import FusionOptions
from edgevlm.reduce.plan import MAIN, Segment, Stage, state_segments
from edgevlm_export.forms import FORMS
from edgevlm_export.plan import GraphPlan
from edgevlm_runtime.manifest import StateGroup, StateTensor, TensorSpec

PICTURE = "picture"
"""The phase of whole prompts with visual tokens, some of which are taken away on the way."""
# A verify call wants logits of all its rows; a longer call is a piece of a prompt.
MAX_VERIFY_ROWS = 8
# Text rows that a vision graph of fixed shape is shown of a question: the last of them.
QUESTION_ROWS = 64
# What caches can be quantized to: GroupQueryAttention has no float8 on a CPU, and standard ops pack
# no two int4 in a byte.
INPLACE_CACHES = FORMS["ort"].caches
DELTA_CACHES = FORMS["static"].caches


FINE = "image_features"
"""What visual tokens look at again: features of the patches of all pictures, window by window."""


def vision_plan(spec: VlmSpec, grid: tuple[int, int], num_images: int | None = None) -> GraphPlan:
    """Pixels of pictures (or tiles) of a grid to their rows; without `num_images`, any number.

    Where positions rotate there is one picture a call. Where stages look at the question, its rows
    come too; where visual tokens keep the positions they had, these go out, and where text is fused
    with the pictures, the text.
    """
    vision, reduction = spec.vision, spec.reduction
    name = "vision" if len(vision.grids) == 1 else "vision_{}x{}".format(*grid)
    stages = () if reduction is None else reduction.of(grid, "encoder", "projector")
    fusion = None if reduction is None else reduction.fusion
    kinds = sorted({kind for stage in stages for kind in stage.queries} | _fused(fusion))
    # What is fused has a fixed number of rows, of one picture.
    is_fixed = vision.position == "rotary" or fusion is not None
    batch = 1 if is_fixed else num_images or "N"
    inputs = [_float("pixels", (batch, *vision.pixels_shape(grid)), "pixels")]
    if kinds:
        length: int | str = "Q" if num_images is None else QUESTION_ROWS
        if fusion is not None:
            length = fusion.rows
        shape = (1, length, spec.decoder.width)
        inputs.append(_float("question_embeds", shape, "question_embeds"))
        for kind in kinds:
            source = f"question_weights:{kind}"
            inputs.append(_float(f"question_{kind}", (1, length), source))
    tokens = spec.image_tokens(grid)
    outputs = [_float("image_embeds", (batch, tokens, spec.decoder.width))]
    if spec.moves_positions(grid):
        axes = len(spec.decoder.rope.sections) or 1
        outputs.append(_float("image_positions", (batch, tokens, axes)))
    if fusion is not None:
        outputs.append(_float("text_embeds", (batch, fusion.rows, spec.decoder.width)))
    if spec.remembered_width:
        # What several calls give is joined along axis 1, picture by picture.
        patches = grid[0] * grid[1]
        outputs.append(_float(FINE, (batch, 1, patches, spec.remembered_width)))
    return GraphPlan(name=name, inputs=tuple(inputs), outputs=tuple(outputs))


def _fused(fusion: FusionOptions | None) -> set[str]:
    """Kinds of weights of text that a fusion is shown."""
    return set() if fusion is None else {"text"}


def inplace_plan(
    spec: VlmSpec, capacity: int, name: str = "step", *, pictures: bool = False
) -> GraphPlan:
    """The step that extends its cache: T rows of this call, after the used slots.

    With `pictures` the rows are a whole prompt with P picture groups.
    """
    _check_cache(spec, INPLACE_CACHES, "a step that extends its cache")
    decoder = spec.decoder
    groups = step_states(spec, capacity, "inplace")
    lengths = []
    for group in groups:
        end = _suffix(group.name)
        last, total = f"last_slot:{group.name}", f"total:{group.name}"
        lengths.append(TensorSpec(name=f"seqlens_k{end}", dtype="int32", shape=(1,), source=last))
        lengths.append(
            TensorSpec(name=f"total_sequence_length{end}", dtype="int32", shape=(), source=total)
        )
    state = _by_layer(groups)
    return GraphPlan(
        name=name,
        inputs=(
            _float("inputs_embeds", (1, "T", decoder.width), "embeds"),
            *_rope_inputs(spec, picture_room(spec, capacity) if pictures else capacity),
            *lengths,
            TensorSpec(name="logit_rows", dtype="int64", shape=("R",), source="logit_rows"),
            *(_picture_inputs(spec, "T", "P") if pictures else ()),
            *(_state_input(tensor) for tensor in state),
        ),
        outputs=(
            _float("logits", (1, "R", decoder.vocab_size)),
            *(_state_output(tensor, tensor.shape) for tensor in state),
        ),
        defaults={"logit_rows": np.array([-1], dtype=np.int64)},
        # Rows are taken away from what is traced: there must be enough of them.
        examples={"T": max(spec.entering * 8, 64)} if pictures else {},
    )


def picture_room(spec: VlmSpec, capacity: int, pictures: int | None = None) -> int:
    """The most rows of a prompt with so many pictures, of as many as are planned where None.

    Rows that a bottleneck hides take no slots.
    """
    if spec.reduction is None:
        return capacity
    return capacity + spec.hidden * (spec.reduction.pictures if pictures is None else pictures)


def _suffix(group: str) -> str:
    """What distinguishes the inputs of a state group: nothing for the one that is always there."""
    return "" if group == MAIN else f".{group}"


def _rope_inputs(spec: VlmSpec, rows: int) -> list[TensorSpec]:
    """The rotary tables, and those of segments that count positions anew."""
    found = []
    for segment in state_segments(spec.segments):
        if segment.group == MAIN or segment.is_packed:
            end = "" if segment.group == MAIN else f":{segment.group}"
            shape = (rows, len(spec.decoder.rope.inv_freq))
            for part in ("rope_cos", "rope_sin"):
                name = f"{part}{_suffix(segment.group)}"
                found.append(_float(name, shape, f"{part}{end}"))
    return found


def _picture_inputs(spec: VlmSpec, rows: int | str, pictures: int | str) -> list[TensorSpec]:
    """Where visual tokens stand, and which rows ask about them."""
    deep = () if spec.reduction is None else (*spec.reduction.cuts, *spec.reduction.skips)
    found = [
        TensorSpec(name="picture_rows", dtype="int64", shape=(pictures,), source="picture_rows")
    ]
    if deep or spec.remembered_width:
        found.append(TensorSpec(name="last_row", dtype="int64", shape=(1,), source="last_row"))
    if spec.remembered_width:
        shape = (1, pictures, math.prod(spec.vision.grids[0]), spec.remembered_width)
        found.append(_float(FINE, shape, f"output:{FINE}"))
    for kind in asked_kinds(deep):
        found.append(_float(f"asks_{kind}", (1, rows), f"row_weights:{kind}"))
    return found


def asked_kinds(stages: Iterable[Stage]) -> list[str]:
    """The kinds of text rows whose weights stages are fed: raters are found among the question."""
    kinds = {kind for stage in stages for kind in stage.queries}
    return sorted("question" if kind == "raters" else kind for kind in kinds)


def reads_prompts(phases: Collection[str]) -> bool:
    """Whether a step graph that serves these phases reads prompts alone."""
    return bool(phases) and set(phases) <= {"prefill", PICTURE}


def step_name(phases: Collection[str]) -> str:
    """The name of a dynamic step graph that serves these phases."""
    alone = set(phases)
    return "prefill" if alone == {"prefill"} else "picture" if alone == {PICTURE} else "step"


def delta_plan(
    spec: VlmSpec, capacity: int, num_rows: int, *, pictures: int | None = None
) -> GraphPlan:
    """The step of `num_rows` rows that returns the new rows of its cache.

    With `pictures` the rows are a whole prompt with that many picture groups.
    """
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
    groups = step_states(spec, capacity, "delta")
    masks, rows_of = [], dict[str, int]()
    for group, segment in zip(groups, state_segments(spec.segments), strict=True):
        rows = num_rows - (pictures or 0) * (spec.entering - segment.tokens)
        shape = (1, 1, rows, group.capacity + rows)
        masks.append(_float(f"attn_mask{_suffix(group.name)}", shape, f"mask:{group.name}"))
        rows_of |= {tensor.name: rows for tensor in group.tensors}
    state = _by_layer(groups)
    news = [
        _state_output(tensor, (*tensor.shape[:2], rows_of[tensor.name], tensor.shape[3]))
        for tensor in state
    ]
    wanted = 1 if pictures else num_logit_rows(num_rows)
    return GraphPlan(
        name=f"step_{num_rows}" if pictures is None else f"picture_{pictures}_{num_rows}",
        inputs=(
            _float("inputs_embeds", (1, num_rows, decoder.width), "embeds"),
            *_rope_inputs(spec, num_rows),
            *masks,
            TensorSpec(name="logit_rows", dtype="int64", shape=(wanted,), source="logit_rows"),
            *(_picture_inputs(spec, num_rows, pictures) if pictures else ()),
            *(_state_input(tensor) for tensor in state),
        ),
        outputs=(_float("logits", (1, wanted, decoder.vocab_size)), *news),
    )


def num_logit_rows(num_rows: int) -> int:
    """Rows of logits of a static step: all of a verify call, the last of a piece of a prompt."""
    return num_rows if num_rows <= MAX_VERIFY_ROWS else 1


def step_states(spec: VlmSpec, capacity: int, form: str) -> tuple[StateGroup, ...]:
    """The state of a form of step, one group for each run of layers that see as many rows.

    `capacity` is that of the first. The others have less room by what is taken from one picture.
    """
    state = inplace_state if form == "inplace" else delta_state
    dense = spec.segments[0].tokens
    return tuple(
        state(spec, capacity - (dense - segment.tokens), segment)
        for segment in state_segments(spec.segments)
    )


def _by_layer(groups: Iterable[StateGroup]) -> list[StateTensor]:
    """The tensors of some groups as a decoder meets them."""
    tensors = [tensor for group in groups for tensor in group.tensors]
    return sorted(tensors, key=lambda tensor: -1 if tensor.layer is None else tensor.layer)


def inplace_state(spec: VlmSpec, capacity: int, segment: Segment | None = None) -> StateGroup:
    """The cache of the `inplace` form, named as onnxruntime-genai names it."""
    names = "past_key_values.{}.{}", "present.{}.{}"
    return _state(spec, capacity, "kv_inplace", *names, segment)


def delta_state(spec: VlmSpec, capacity: int, segment: Segment | None = None) -> StateGroup:
    """The cache of the `delta` form."""
    return _state(spec, capacity, "kv_delta", "past_{1}.{0}", "new_{1}.{0}", segment)


def _state(
    spec: VlmSpec, capacity: int, kind: str, name: str, output: str, segment: Segment | None
) -> StateGroup:
    """Keys and values of the layers of a segment's group, of the first where none is named."""
    segment = spec.segments[0] if segment is None else segment
    here = [part for part in spec.segments if part.group == segment.group]
    return StateGroup(
        name=segment.group,
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
            if any(part.first <= index < part.end for part in here)
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
