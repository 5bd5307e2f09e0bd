"""What a model is, as plain data: everything that its forward pass, its graphs and `plan` need.

A family makes a `VlmSpec` from `config.json` alone, without weights and without torch; `build`
makes a module of it. A layer is data too: a block swap changes its `LayerSpec` and its module
together. Patch grids are (height, width), counted in patches before any merging.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgevlm.quant.spec import Scheme
from edgevlm.reduce.plan import Reduction, Segment
from edgevlm_runtime.manifest import GenerationSpec, RopeSpec

__all__ = [
    "AttentionSpec",
    "DecoderSpec",
    "GenerationSpec",
    "KvQuant",
    "LayerSpec",
    "MlpSpec",
    "NormSpec",
    "ProjectorSpec",
    "RopeSpec",
    "Scheme",
    "VisionSpec",
    "VlmSpec",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class NormSpec:
    """A norm over the last axis: `rms` (weight) or `layer` (weight and bias)."""

    kind: str
    eps: float


@dataclass(frozen=True, kw_only=True, slots=True)
class KvQuant:
    """A cache of keys (after rotary) and values in fewer bits: a scale times a number of a grid.

    `dtype` is `int8`, `int4`, `float8_e4m3fn` or `float8_e5m2`; the numbers of a whole `tensor`
    share a scale, or those of a `channel`, which is a feature of a key-value head. Scales are
    constants of the graph, found by calibration.
    """

    dtype: str
    granularity: str

    @property
    def stored_dtype(self) -> str:
        """The dtype of the tensors: two int4 lie in a uint8."""
        return "uint8" if self.dtype == "int4" else self.dtype

    def stored_width(self, head_dim: int) -> int:
        """The last dimension of the tensors, for heads of `head_dim` numbers."""
        return head_dim // 2 if self.dtype == "int4" else head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """Softmax attention; several query heads may share a key-value head.

    `q_norm` and `k_norm` work on each head alone. `window` is how many rows a row sees, itself
    counted. `kv` says how its cache is quantized, None for float32.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool
    out_bias: bool
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    window: int | None = None
    kv: KvQuant | None = None

    @property
    def q_width(self) -> int:
        """Width of all query heads together, which need not be the width of the model."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpSpec:
    """`down(act(up x))`, or gated: `down(act(gate x) * up x)`."""

    width: int
    activation: str
    gated: bool
    bias: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One residual layer: `x + mixer(norm1 x)`, then `x + mlp(norm2 x)`.

    `mixer` is `attention`, or in a vision encoder `window_attention`: each patch sees the patches
    of its own window.
    """

    mixer: str
    attention: AttentionSpec
    mlp: MlpSpec
    norm1: NormSpec
    norm2: NormSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """The language model: embedding, layers, norm, head (`tied`: the embedding is the head)."""

    width: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    tied: bool
    rope: RopeSpec
    max_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSpec:
    """The encoder of pixels.

    `grids` are the patch grids it is built for: one for a fixed image size, one per vision graph
    for native resolution. `pixels` is the layout of one picture: `image` [C, H, W], or `patches`
    [rows, C * temporal * patch * patch], in squares of `merge` x `merge` patches. `image_size` is
    the side of an `image` in pixels where that is not a whole number of patches; the patches start
    at its top left corner and leave the rest out (384 pixels, 27 patches of 14). `position` is
    `learned` (a table of one row per patch, and one for the class token), `bucketed` (such a table,
    whose rows are found as transformers finds them for Idefics3) or `rotary` (2-D, in attention,
    with base `rotary_theta`). `window` is the side of a window in patches. `feature_layers` index
    the hidden states (0 is the embedding, i the output of layer i) whose concatenation leaves the
    encoder; `norm` acts on the last one. `drop_first_row` leaves out the class token (without one,
    the first patch, as transformers does).
    """

    width: int
    num_channels: int
    patch_size: int
    grids: tuple[tuple[int, int], ...]
    layers: tuple[LayerSpec, ...]
    position: str
    feature_layers: tuple[int, ...]
    pixels: str = "image"
    image_size: int | None = None
    patch_bias: bool = False
    class_token: bool = False
    drop_first_row: bool = False
    pre_norm: NormSpec | None = None
    norm: NormSpec | None = None
    temporal_patch_size: int = 1
    merge: int = 1
    window: int = 0
    rotary_theta: float = 10000.0

    @property
    def num_positions(self) -> int:
        """Rows of the table of positions."""
        height, width = self.grids[0]
        return height * width + int(self.class_token)

    @property
    def out_width(self) -> int:
        """Width of what leaves the encoder."""
        return self.width * len(self.feature_layers)

    @property
    def patch_width(self) -> int:
        """Numbers of one patch that comes flattened."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    def pixels_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the pixels of one picture (or tile) of that grid, without the batch axis."""
        height, width = grid
        if self.pixels == "patches":
            return height * width, self.patch_width
        if self.image_size is not None:
            return self.num_channels, self.image_size, self.image_size
        return self.num_channels, height * self.patch_size, width * self.patch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorSpec:
    """The map from vision features to rows of the decoder.

    `kind` is `mlp` (up, act, down), `pixel_shuffle` (squares of `merge` x `merge` patches become a
    row, then one linear map) or `patch_merger` (norm, squares become a row, up, act, down).
    `in_width` is the width of a patch; `pixel_shuffle` has no hidden width and no activation.
    """

    kind: str
    in_width: int
    out_width: int
    bias: bool
    hidden_width: int = 0
    activation: str = ""
    merge: int = 1
    norm: NormSpec | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VlmSpec:
    """The whole model, and what the runtime must know to feed it.

    `image` and `text` are the manifest's image and text sections. `notes` say, one clause each,
    what the checkpoint asks for that a bundle does not do. `schemes` has the quantized linear maps
    by their sites; those under `prefill`, in place of `decoder`, are of a decoder for prompts
    alone. `table` is the scheme of a quantized embedding. `reduction` are the stages that take
    visual tokens away.
    """

    family: str
    vision: VisionSpec
    projector: ProjectorSpec
    decoder: DecoderSpec
    image_token_id: int
    image: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    generation: GenerationSpec = field(default_factory=lambda: GenerationSpec(eos_token_ids=()))
    notes: tuple[str, ...] = ()
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    table: Scheme | None = None
    reduction: Reduction | None = None

    @property
    def has_prefill(self) -> bool:
        """Whether prompts have weights of their own."""
        return any(site.startswith("prefill.") for site in self.schemes)

    @property
    def head_is_table(self) -> bool:
        """Whether the head has the numbers of the table: both in float, or of the same weights."""
        head, table = self.schemes.get("decoder.head"), self.table
        if head is None or table is None:
            return self.decoder.tied and head is None and table is None
        return self.decoder.tied and head.weights == table.weights

    @property
    def is_quantized(self) -> bool:
        """Whether any linear map, any cache or the table is."""
        caches = [layer.attention.kv for layer in self.decoder.layers]
        return bool(self.schemes) or self.table is not None or any(caches)

    def image_tokens(self, grid: tuple[int, int]) -> int:
        """Rows of the decoder that one picture (or tile) of that grid becomes."""
        dense = self.dense_tokens(grid)
        return dense if self.reduction is None else self.reduction.tokens(grid, dense)

    def dense_tokens(self, grid: tuple[int, int]) -> int:
        """The same before any reduction."""
        return self.patch_tokens(grid) // self.projector.merge**2

    def patch_tokens(self, grid: tuple[int, int]) -> int:
        """Rows that leave the encoder before any reduction."""
        height, width = grid
        extra = int(self.vision.class_token) - int(self.vision.drop_first_row)
        return height * width + extra

    def token_grid(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """The grid in which visual tokens lie in raster order; None where they do not."""
        merge = self.projector.merge
        is_whole = self.patch_tokens(grid) == grid[0] * grid[1]
        return (grid[0] // merge, grid[1] // merge) if is_whole else None

    @property
    def rule_axes(self) -> int:
        """Numbers that tell the places of a picture apart: one, or those of a grid."""
        reduction = self.reduction
        policy = None if reduction is None else reduction.positions
        return self.decoder.rope.num_axes // (1 if policy is None else policy.num_places)

    def keeps_places(self, grid: tuple[int, int]) -> bool:
        """Whether visual tokens of that grid stand where they stood in the whole picture."""
        before = () if self.reduction is None else self.reduction.before(grid)
        # Rows behind a picture count on, and move nothing.
        before = tuple(stage for stage in before if stage.bottleneck is None)
        return bool(before) and before[-1].place == "keep"

    def moves_positions(self, grid: tuple[int, int]) -> bool:
        """Whether visual tokens of that grid stand where the graph says that made them."""
        if self.reduction is None:
            return False
        policy, before = self.reduction.positions, self.reduction.before(grid)
        if policy is not None and policy.ppe is not None:
            return True
        return self.keeps_places(grid) and any(stage.transform is None for stage in before)

    @property
    def remembered_width(self) -> int:
        """Features of a patch that visual tokens look at again in the decoder; 0 where none do."""
        remember = None if self.reduction is None else self.reduction.remember
        if remember is None:
            return 0
        return len(remember.encoder_layers(len(self.vision.layers))) * self.vision.width

    @property
    def entering(self) -> int:
        """Rows of a picture (or tile) that enter the decoder, where all grids give as many."""
        return self.image_tokens(self.vision.grids[0])

    @property
    def hidden(self) -> int:
        """Those of them that no row behind the picture sees, and no state keeps."""
        return 0 if self.reduction is None else self.reduction.hidden

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The runs of decoder layers that see the same rows: one, unless stages cut between."""
        num_layers = len(self.decoder.layers)
        dense = self.dense_tokens(self.vision.grids[0])
        if self.reduction is not None:
            return self.reduction.segments(num_layers, dense)
        return (Segment(group="main", first=0, end=num_layers, tokens=dense),)
