"""What a bundle says about itself: the types of `manifest.json`, defined once and here.

The compiler builds these and writes them; the runtime reads them and trusts nothing else. A field
is data that the runtime acts on: which graphs there are, what feeds each input, which tensors are
state and how each kind is committed and rewound. `edgevlm_runtime.structure` turns JSON into these
types and back, refusing unknown keys and wrong types by name.

Sources of graph inputs
    A graph input names where its value comes from, and the session feeds it by that name.
    `pixels`             preprocessed pixels of one tile or picture
    `grid`               patch grid of a native-resolution picture
    `tokens`             token ids                           (of the embedding table)
    `embeds`             rows of the prompt, or of the tokens of this call, embedded [1, T, W]
    `question_embeds`    embedded text rows of the prompt [1, Q, W], before any picture is encoded;
                         where Q is a number the last Q of them, zero rows first if there are fewer
    `question_weights:KIND`  float32 [1, Q], the weights of these rows
    `row_weights:KIND`   float32 [1, T], the weights of the rows of this call, 0 for visual rows and
                         for padding
    `picture_rows`       int64 [P], where each picture group of this call begins: the visual tokens
                         that one call of the vision graph gives, which stand in consecutive rows
    `last_row`           int64 [1], the last row of this call that is no padding
    `rope_cos`, `rope_sin`   rotary tables, row r for row r of this call; further rows are not read
    `rope_cos:GROUP`, `rope_sin:GROUP`   the same for a group whose positions are packed: row r of
                         those that reach it stands where row r of this call does, less the rows
                         that earlier calls have dropped
    `last_slot:GROUP`    int32 [1], used slots + T - 1       (`seqlens_k` of GroupQueryAttention)
    `total:GROUP`        int32 [], used slots + T            (`total_sequence_length`)
    `used:GROUP`         int64 [1], used slots before this call
    `mask:GROUP`         additive float mask [1, 1, T, S + T]: cache slots, then rows of this call
    `row_valid`          float [1, T, 1], 0 for padding rows, which come last
    `logit_rows`         int64 [R], the rows that logits are wanted for
    `state:NAME`         the state tensor of that name
    `output:NAME`        an output of that name of a graph that ran before
    `constant:FILE`      the array in that file of the bundle (.npy)

Kinds of weights
    `text` weighs every text row of the prompt 1. `question` those after its last visual row, all
    where it has none. `words` those of `question` whose token is not silent (`silent_tokens` of the
    text spec), or all of them where every one is.

Dtypes
    `float64`, `float32`, `float16`, `int64`, `int32`, `int16`, `int8`, `uint8`, `bool` are those of
    numpy. `float8_e4m3fn` and `float8_e5m2` are only for state: a graph makes them and reads them,
    the host moves their bytes, and zero is the byte 0. A state of int4 is `uint8`, with two numbers
    in each byte, whose last dimension is half as long.

Options of the engine `table`
    A plain table has none: its file is a float array [V, W]. With `bits` (`4` or `8`) and
    `block_size` (a power of two from 16 on) the file is uint8 [V, B, block_size * bits / 8], B
    blocks of a row of which the last may be longer than what is left of W, and the one file of
    `weights` float32 [V, B] their scales. A number is scale * (code - 2^(bits - 1)), and of two
    codes in a byte the first is the lower half: as com.microsoft::MatMulNBits has it, so that a
    head can read the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT_VERSION = 1

DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""The dtypes of tensors, with the bytes of a number."""

WEIGHTS = ("text", "question", "words")
"""The kinds of weights of rows."""


def carrier(dtype: str) -> str:
    """The numpy dtype that carries a dtype on the host: the bytes of float8, else itself."""
    return "uint8" if dtype.startswith("float8") else dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One input or output of a graph; a dimension is a number, or a name where it is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """What runs a graph, and the options it is given (`session.force_spinning_stop: "1"`)."""

    kind: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphSpec:
    """One executable: its job, its files, its inputs and outputs.

    `phases` says which calls a step graph may serve (`prefill`, `decode`, `verify`, or `picture`
    alone: a prompt with visual tokens, whole); `rows` is the number of rows of a static graph, or
    None where T is dynamic up to `max_rows`. `mask` is `causal` (built in) or `additive` (an input,
    whose closed value is `mask_value`). `grid` is the patch grid (height, width) that a static
    native-resolution vision graph was made for. `dropped` says for a state group how many rows
    never reach it, because the graph reduces them before the layers of that group, or hides them
    from what follows and keeps the others: rows of each picture group where the graph has an input
    of source `picture_rows`, else of each call. T in the group's inputs is then T less these.
    """

    name: str
    role: str
    file: str
    engine: EngineSpec
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()
    rows: int | None = None
    max_rows: int | None = None
    mask: str = "causal"
    mask_value: float = -60000.0
    grid: tuple[int, int] | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StateTensor:
    """One tensor carried from call to call: which input it feeds, which output renews it.

    `kind` is a row of the table in `edgevlm_runtime.state`, which says what the graph writes and
    how it is committed. `axis` is the one along which slots, columns or new rows lie; `layer` is
    for people.
    """

    name: str
    kind: str
    input: str
    output: str
    dtype: str
    shape: tuple[int, ...]
    axis: int = 2
    layer: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class StateGroup:
    """Tensors that share a capacity and a used length."""

    name: str
    capacity: int
    tensors: tuple[StateTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary positions: frequencies, and which of several axes each of them turns with.

    `inv_freq` has rotary_dim / 2 entries; `sections` is empty for one position number per row, else
    it has for each axis the number of consecutive frequencies that turn with it: for M-RoPE the
    temporal, height and width position, for PPE K positions in the place of each.
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0
    sections: tuple[int, ...] = ()

    @property
    def num_axes(self) -> int:
        """Numbers of a position."""
        return len(self.sections) or 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One compiled form of the model: its graphs, and the state that they share.

    `max_positions` is the number of rows that the checkpoint was made for: no prompt with its
    answer may be longer, whatever the capacity of the state.
    """

    target: str
    graphs: tuple[GraphSpec, ...]
    state: tuple[StateGroup, ...]
    rope: RopeSpec | None
    max_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Size in bytes and hash of one file, the hash as `edgevlm_runtime.files` defines it."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """Where the model came from."""

    name: str
    family: str
    source: str
    revision: str | None = None
    license: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSpec:
    """Defaults of generation, from the checkpoint and the recipe; a call may override them."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The whole of `manifest.json`.

    `image` and `text` are read by `edgevlm_runtime.image` and `edgevlm_runtime.text`; `provenance`
    (recipe, versions, changes, decisions, evidence) is for people and for `edgevlm inspect`, and
    nothing at run time depends on it.
    """

    format_version: int
    name: str
    device: str
    model: ModelInfo
    variants: Mapping[str, Variant]
    default_variant: str
    image: Mapping[str, Any]
    text: Mapping[str, Any]
    generation: GenerationSpec
    files: Mapping[str, FileEntry]
    provenance: Mapping[str, Any] = field(default_factory=dict)
