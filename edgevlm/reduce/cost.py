"""What a prompt with a picture costs: multiply-adds of every part, and numbers of the cache.

Counted from the spec alone. A decoder layer that n rows pass, of width D, with Q numbers of all
queries, K of all keys and M of the hidden MLP, takes

    n D (Q + 2 K)  +  2 n s Q  +  n Q D  +  (3 if gated, else 2) n D M

multiply-adds, where a row is compared with s rows: n in a prompt that is the first of its session,
fewer in a window, all slots and rows in a graph of fixed shape. Where every head has keys of its
own and the MLP is gated, that is F(n) = 4 n D^2 + 2 n^2 D + 3 n D M, by which papers on reduction
count (CATP, SparseVLM). As there, a causal mask saves nothing, and norms, rotation, softmax and the
head, which sees one row of a prompt, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgevlm.model.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, VlmSpec
from edgevlm.reduce.extent import Extent, Layer, extent_of
from edgevlm.reduce.merges.registers import Registers
from edgevlm.reduce.plan import Grid, Stage

__all__ = [
    "Cost",
    "Prompt",
    "choosing_macs",
    "kept_rows",
    "kv_bytes",
    "kv_numbers",
    "layer_macs",
    "prefill_macs",
    "projector_macs",
    "prompt_cost",
    "prompt_rows",
    "vision_macs",
    "visual_tokens",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One picture and some rows of text.

    The picture comes as `groups` of a patch grid: one, or its tiles. What stands around tiles is
    text.
    """

    grid: Grid
    text_rows: int
    groups: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Multiply-adds of the parts, and the keys and values that a prompt leaves in the cache.

    `choosing` are the products by which stages find and move the tokens that go on.
    """

    vision: int
    projector: int
    prefill: int
    choosing: int
    kv_numbers: int
    kv_bytes: int

    @property
    def total(self) -> int:
        """All multiply-adds."""
        return self.vision + self.projector + self.prefill + self.choosing


def prompt_cost(spec: VlmSpec, prompt: Prompt) -> Cost:
    """What a model does to read a prompt."""
    rows, kept = prompt_rows(spec, prompt), kept_rows(spec, prompt)
    return Cost(
        vision=prompt.groups * vision_macs(spec, prompt.grid),
        projector=prompt.groups * projector_macs(spec, prompt.grid),
        prefill=prefill_macs(spec.decoder, rows),
        choosing=choosing_macs(spec, prompt),
        kv_numbers=kv_numbers(spec.decoder, kept),
        kv_bytes=kv_bytes(spec.decoder, kept),
    )


def visual_tokens(spec: VlmSpec, grid: Grid) -> tuple[int, ...]:
    """Rows of a picture of a grid that pass each layer of the decoder.

    They are its visual tokens, and rows behind them where those stand for the picture.
    """
    first, *deep = spec.segments
    found = [spec.image_tokens(grid)] * (first.end - first.first)
    for segment in deep:
        found += [segment.tokens] * (segment.end - segment.first)
    return tuple(found)


def prompt_rows(spec: VlmSpec, prompt: Prompt) -> tuple[int, ...]:
    """Rows of a prompt, for every layer of the decoder."""
    tokens = visual_tokens(spec, prompt.grid)
    return tuple(prompt.groups * count + prompt.text_rows for count in tokens)


def kept_rows(spec: VlmSpec, prompt: Prompt) -> tuple[int, ...]:
    """Those of them that every layer keeps in the cache: a bottleneck hides the others."""
    return tuple(count - prompt.groups * spec.hidden for count in prompt_rows(spec, prompt))


def layer_macs(layer: LayerSpec, width: int, rows: int, seen: int | None = None) -> int:
    """Multiply-adds of a layer that so many rows pass, each of which is compared with `seen`."""
    if seen is None:
        seen = rows if layer.attention.window is None else min(rows, layer.attention.window)
    return attention_macs(layer.attention, width, rows, rows * seen) + mlp_macs(
        layer.mlp, width, rows
    )


def attention_macs(attention: AttentionSpec, width: int, rows: int, pairs: int) -> int:
    """Multiply-adds of attention: projections of rows, and products of so many pairs of rows."""
    projected = attention.q_width + 2 * attention.kv_width + attention.q_width
    return rows * width * projected + 2 * pairs * attention.q_width


def mlp_macs(mlp: MlpSpec, width: int, rows: int) -> int:
    """Multiply-adds of an MLP."""
    return rows * width * mlp.width * (3 if mlp.gated else 2)


def prefill_macs(
    decoder: DecoderSpec, rows: Sequence[int], seen: Sequence[int] | None = None
) -> int:
    """Multiply-adds of the layers of a decoder, with the rows of each, whatever these are.

    `seen` are the rows that each row of a layer is compared with, where a graph has more of them
    than rows.
    """
    compared: Sequence[int | None] = [None] * len(decoder.layers) if seen is None else seen
    return sum(
        layer_macs(layer, decoder.width, count, keys)
        for layer, count, keys in zip(decoder.layers, rows, compared, strict=True)
    )


def kv_numbers(decoder: DecoderSpec, rows: Sequence[int]) -> int:
    """Keys and values, counted as numbers, of the rows of each layer."""
    return sum(
        2 * count * layer.attention.kv_width
        for layer, count in zip(decoder.layers, rows, strict=True)
    )


def kv_bytes(decoder: DecoderSpec, rows: Sequence[int]) -> int:
    """Bytes of the same, as the cache stores them."""
    return sum(
        2 * count * layer.attention.num_kv_heads * _head_bytes(layer.attention)
        for layer, count in zip(decoder.layers, rows, strict=True)
    )


def _head_bytes(attention: AttentionSpec) -> int:
    """Bytes of the keys of one head and row."""
    if attention.kv is None:
        return 4 * attention.head_dim
    # Whatever the cache is quantized to lies in bytes: one number in each, or two.
    return attention.kv.stored_width(attention.head_dim)


def vision_macs(spec: VlmSpec, grid: Grid) -> int:
    """Multiply-adds of the encoder for one picture of a grid, stages before and in it heeded."""
    vision = spec.vision
    total = grid[0] * grid[1] * vision.patch_width * vision.width
    for layer, (attending, left) in zip(vision.layers, encoder_rows(spec, grid), strict=True):
        windowed = layer.mixer == "window_attention"
        pairs = _window_pairs(grid, vision.window) if windowed else attending**2
        total += attention_macs(layer.attention, vision.width, attending, pairs)
        total += mlp_macs(layer.mlp, vision.width, left)
    for stage, piece in _registers(spec, grid):
        total += len(vision.layers) * piece.layer_macs(extent_of(spec, stage))
    return total


def _fused_macs(spec: VlmSpec, grid: Grid) -> int:
    """Multiply-adds of the layers that see a picture and text before the decoder.

    With them those of counting the rows of text.
    """
    assert spec.reduction is not None
    fusion, decoder = spec.reduction.fusion, spec.decoder
    if fusion is None:
        return 0
    whole = _whole_features(spec, grid) // spec.projector.merge**2
    rows = whole + spec.image_tokens(grid) + fusion.rows
    layers = fusion.layers * layer_macs(decoder.layers[0], decoder.width, rows, rows)
    places = len(decoder.rope.inv_freq) * fusion.rows * rows if spec.reduction.dense else 0
    return layers + fusion.rows**2 + 2 * places


def _remembered_macs(spec: VlmSpec, grid: Grid) -> int:
    """Multiply-adds of tokens that look at their patches again: queries, keys, values and sums."""
    assert spec.reduction is not None
    remember, width = spec.reduction.remember, spec.decoder.width
    if remember is None:
        return 0
    patches, tokens = grid[0] * grid[1], spec.image_tokens(grid)
    projected = 2 * tokens * width * width + 2 * patches * spec.remembered_width * width
    layers = remember.decoder_layers(len(spec.decoder.layers))
    return len(layers) * (projected + 2 * patches * width)


def _registers(spec: VlmSpec, grid: Grid) -> list[tuple[Stage, Registers]]:
    """The stage that takes registers, and they themselves."""
    stages = _stages(spec, grid, "encoder")
    return [(stage, stage.merge) for stage in stages if isinstance(stage.merge, Registers)]


def encoder_rows(spec: VlmSpec, grid: Grid) -> list[tuple[int, int]]:
    """Rows of the attention and of the MLP of every layer of the encoder."""
    stages = {stage.layer: stage for stage in _stages(spec, grid, "encoder.layers")}
    before, extra = _stages(spec, grid, "input"), int(spec.vision.class_token)
    # Registers pass beside the patches.
    extra += sum(stage.count_out for stage, _ in _registers(spec, grid))
    here = before[-1].count_out if before else grid[0] * grid[1]
    found = []
    for index in range(len(spec.vision.layers)):
        stage, attending = stages.get(index), here
        here = here if stage is None else stage.count_out
        # A merge stands between the two, a transform behind both.
        is_behind = stage is not None and stage.transform is not None
        found.append((attending + extra, (attending if is_behind else here) + extra))
    return found


def projector_macs(spec: VlmSpec, grid: Grid) -> int:
    """Multiply-adds of the projector for one picture of a grid."""
    before = _stages(spec, grid, "encoder")
    whole = _whole_features(spec, grid)
    total = _projected(spec, before[-1].count_out if before else whole)
    if before and spec.reduction is not None and spec.reduction.fusion is not None:
        # What stages took away is seen all the same.
        total += _projected(spec, whole)
    return total


def _whole_features(spec: VlmSpec, grid: Grid) -> int:
    """Rows that the layers of the encoder leave."""
    before = _stages(spec, grid, "input", "encoder.layers")
    return before[-1].count_out if before else spec.patch_tokens(grid)


def _projected(spec: VlmSpec, features: int) -> int:
    """Multiply-adds of projecting so many features."""
    projector = spec.projector
    rows, width = features // projector.merge**2, projector.in_width * projector.merge**2
    if not projector.hidden_width:
        return rows * width * projector.out_width
    return rows * projector.hidden_width * (width + projector.out_width)


def choosing_macs(spec: VlmSpec, prompt: Prompt) -> int:
    """Multiply-adds of the stages of a model, for the groups of a prompt.

    Where nothing sorts and nothing is looked up, look-ups of whole tokens are products, and are
    counted; those of single numbers are left out. What a bottleneck hides is found by one product,
    of the rows of a prompt with themselves.
    """
    if spec.reduction is None:
        return 0
    rows = prompt_rows(spec, prompt)
    total = prompt.groups * _ordered_macs(spec, prompt.grid)
    if spec.hidden:
        total += prompt.groups * rows[0] ** 2
    for stage in dict(spec.reduction.stages)[prompt.grid]:
        if stage.at == "input" and stage.transform is not None:
            # Pictures are made smaller before they are a graph's.
            continue
        extent = _extent(spec, stage, prompt, rows)
        pieces, passes_all = stage.pieces, stage.count_out == stage.count_in
        if stage.skip is not None and passes_all:
            # All pass, and are weighed by their scores.
            pieces = (stage.score, stage.skip)
        macs = sum(piece.macs(extent) for piece in pieces)
        if stage.at != "decoder":
            total += prompt.groups * (macs + _moved_macs(stage, extent))
        elif stage.skip is not None or not (passes_all or stage.count_out == 0):
            # A cut that takes all or nothing has nothing to choose.
            total += macs + _projected_macs(stage, extent)
    total += prompt.groups * _fused_macs(spec, prompt.grid)
    total += prompt.groups * _remembered_macs(spec, prompt.grid)
    return total + _rater_macs(spec, prompt, rows)


def _stages(spec: VlmSpec, grid: Grid, *sites: str) -> tuple[Stage, ...]:
    """The stages at some sites, for a grid."""
    stages = () if spec.reduction is None else dict(spec.reduction.stages)[grid]
    return tuple(stage for stage in stages if stage.at in sites)


def _window_pairs(grid: Grid, side: int) -> int:
    """Pairs of patches that see each other, in windows of so many patches a side."""
    squares = [
        length // side * side**2 + (length % side) ** 2  # the last window is what is over
        for length in grid
    ]
    return squares[0] * squares[1]


def _extent(spec: VlmSpec, stage: Stage, prompt: Prompt, rows: Sequence[int]) -> Extent:
    """What a stage sees of a prompt."""
    is_deep = stage.at == "decoder"
    return replace(
        extent_of(spec, stage),
        groups=prompt.groups if is_deep else 1,
        layers=_layers(spec, stage, prompt.grid, rows),
        question=prompt.text_rows,
        call=_seen_rows(stage, rows) if is_deep else 0,
    )


def _seen_rows(stage: Stage, rows: Sequence[int]) -> int:
    """Rows that a stage within the decoder sees: all of them, where some only skip a layer."""
    assert stage.layer is not None
    return rows[0 if stage.skip is not None else stage.layer - 1]


def _layers(
    spec: VlmSpec, stage: Stage, grid: Grid, rows: Sequence[int]
) -> Mapping[int | str, Layer]:
    """The attention layers that a stage may look at."""
    vision, decoder = spec.vision, spec.decoder
    if stage.at == "decoder":
        assert stage.layer is not None
        deep, seen = decoder.layers, _seen_rows(stage, rows)
        return {
            name: Layer(attention=deep[index].attention, rows=seen, width=decoder.width)
            for name, index in (("own", stage.layer), ("previous", stage.layer - 1))
        }
    found: dict[int | str, Layer] = {}
    for index, (attending, _) in enumerate(encoder_rows(spec, grid)):
        attention = vision.layers[index].attention
        layer = Layer(attention=attention, rows=attending, width=vision.width)
        found[index - len(vision.layers)] = layer
        # Behind the layers, whoever asks for keys without naming a layer gets the last.
        if stage.layer in (index, None):
            found["own"] = layer
    return found


def _moved_macs(stage: Stage, extent: Extent) -> int:
    """Multiply-adds of taking the chosen tokens, or of putting merged ones in order."""
    if stage.select is not None and not extent.extra:
        return extent.taken_macs(extent.kept, extent.tokens, extent.width)
    if stage.merge is not None and stage.at != "encoder.layers" and not stage.merge.is_ordered:
        return extent.taken_macs(extent.kept, extent.kept, extent.width)
    return 0


def _ordered_macs(spec: VlmSpec, grid: Grid) -> int:
    """Multiply-adds of putting patches in order behind layers in which they were merged."""
    merges = [stage for stage in _stages(spec, grid, "encoder.layers") if stage.merge is not None]
    if not merges or not merges[-1].dense:
        return 0
    return merges[-1].count_out ** 2 * spec.vision.out_width


def _projected_macs(stage: Stage, extent: Extent) -> int:
    """Multiply-adds of the queries and keys of a layer for the cut before it; values come along."""
    if not any(piece.looks_here for piece in stage.pieces):
        return 0
    layer = extent.layers["own"]
    return layer.rows * layer.width * (layer.attention.q_width + 2 * layer.attention.kv_width)


def _rater_macs(spec: VlmSpec, prompt: Prompt, rows: Sequence[int]) -> int:
    """Multiply-adds of finding the words that look at pictures: once, as the prompt comes in."""
    assert spec.reduction is not None
    cuts = spec.reduction.cuts
    if not any("raters" in cut.queries for cut in cuts):
        return 0
    return prompt.groups * cuts[0].count_in * rows[0] * spec.decoder.width
