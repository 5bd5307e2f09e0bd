"""The encoder of pixels: a ViT with a table of positions, or with 2-D rotation and windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgevlm.model.attention import (
    AllRows,
    AttentionCore,
    KeySource,
    Watched,
    WeightedRows,
    unpacked,
)
from edgevlm.model.layers import Layer
from edgevlm.model.norms import build_norm
from edgevlm.model.registers import RegisterRows, registers_of
from edgevlm.model.spec import VisionSpec, VlmSpec
from edgevlm.model.stages import (
    Grid,
    Seen,
    StageModule,
    in_raster,
    run_stages,
    stage_modules,
    watched_layers,
    watched_probe,
)
from edgevlm.reduce.order import in_order
from edgevlm.reduce.plan import Stage
from edgevlm.reduce.seq import Probe, VisSeq
from edgevlm.reduce.view import View
from edgevlm_export.ops import attention, rotary


class Position(nn.Module):
    """Adds one learned row to each row."""

    def __init__(self, num_positions: int, width: int, rows: list[int] | None) -> None:
        """Hold the table, and which of its rows are used where that is not all in order."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_positions, width))
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """Add to [N, rows, W]."""
        if self.rows is None:
            return x + self.weight
        return x + self.weight.index_select(0, torch.tensor(self.rows))


class Embed(nn.Module):
    """Pixels to rows: one per patch, after one for the class token where there is one."""

    def __init__(self, spec: VisionSpec) -> None:
        """Build a convolution for images, a linear map for patches that come flattened."""
        super().__init__()
        self.patch: nn.Module
        if spec.pixels == "patches":
            self.patch = nn.Linear(spec.patch_width, spec.width, bias=spec.patch_bias)
        else:
            self.patch = nn.Conv2d(
                spec.num_channels,
                spec.width,
                kernel_size=spec.patch_size,
                stride=spec.patch_size,
                bias=spec.patch_bias,
            )
        self.class_token = nn.Parameter(torch.zeros(spec.width)) if spec.class_token else None
        self.position = None
        if spec.position != "rotary":
            rows = bucketed_rows(spec.grids[0]) if spec.position == "bucketed" else None
            self.position = Position(spec.num_positions, spec.width, rows)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [N, C, H, W] or [N, rows, values] to [N, rows, W]."""
        x: Tensor = self.patch(pixels)
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)
        return x if self.position is None else self.position(x)


@dataclass(frozen=True, kw_only=True, slots=True)
class GridTables:
    """What one patch grid fixes where positions rotate: angles, and the order of the windows.

    Rows come in squares of `merge` x `merge` patches. `order` [rows] sorts them by window, windows
    of the same size together, and `inverse` sorts them back; `cos` and `sin` [rows, R] are sorted.
    `windows` are (number of windows, rows of each), in order.
    """

    order: Tensor
    inverse: Tensor
    cos: Tensor
    sin: Tensor
    windows: tuple[tuple[int, int], ...]


class WindowRows:
    """The rows of a picture, rotated by where they lie, see those of their own window."""

    def __init__(self, cos: Tensor, sin: Tensor, windows: tuple[tuple[int, int], ...]) -> None:
        """Hold the tables and the runs of windows; one window of all rows is full attention."""
        self.cos, self.sin, self.windows = cos, sin, windows

    def attend(self, core: AttentionCore, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        """Attend within [1, rows, H*D]: windows of one size are a batch."""
        spec = core.spec
        q, k, v = unpacked(spec, q, k, v)
        q = rotary(q, self.cos, self.sin, spec.num_heads)
        k = rotary(k, self.cos, self.sin, spec.num_kv_heads)
        sizes = [count * rows for count, rows in self.windows]
        runs = zip(self.windows, *(torch.split(x, sizes, dim=1) for x in (q, k, v)), strict=True)
        outs = []
        for (count, rows), *parts in runs:
            q, k, v = (part.reshape(count, rows, -1) for part in parts)
            out = attention(q, k, v, spec.num_heads, spec.num_kv_heads, spec.scale)
            outs.append(out.reshape(1, count * rows, -1))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionRows:
    """The rows of pictures between two layers of an encoder.

    `x` [N, T, W] are all rows, the class token first where there is one; `tokens` say what the
    others stand for. `probes` and `kept`, the outputs of layers so far, are by number.
    """

    x: Tensor
    tokens: VisSeq[Tensor]
    probes: Mapping[int | str, Probe[Tensor]]
    kept: Mapping[int, Tensor]

    def after(self, index: int, x: Tensor) -> VisionRows:
        """With the output of a layer."""
        return replace(self, x=x, kept={**self.kept, index + 1: x})

    def last(self) -> VisionRows:
        """Without the outputs of earlier layers."""
        return replace(self, kept={})


class Vision(nn.Module):
    """Pixels to features, one row per patch, or fewer where stages stand in it."""

    def __init__(self, spec: VisionSpec) -> None:
        """Build the layers that the features need."""
        super().__init__()
        self.spec = spec
        self.embed = Embed(spec)
        self.pre_norm = build_norm(spec.width, spec.pre_norm) if spec.pre_norm else None
        self.layers = nn.ModuleList(Layer(spec.width, layer) for layer in spec.layers)
        self.norm = build_norm(spec.width, spec.norm) if spec.norm else None
        # Stages before the layers, in them, one for each of some, and behind the last.
        self.drops = nn.ModuleList()
        self.merges = nn.ModuleList()
        self.reduce = nn.ModuleList()
        self.watched = frozenset[int]()
        self.traced = False
        self.registers: RegisterRows | None = None
        self.remembered: tuple[int, ...] = ()

    def stage(self, spec: VlmSpec) -> None:
        """Take the reduction of a model's spec: its stages, at their sites."""
        self.spec = spec.vision
        self.drops = stage_modules(spec, "input")
        self.merges = stage_modules(spec, "encoder.layers")
        self.reduce = stage_modules(spec, "encoder")
        self.watched = watched_layers(spec)
        self.traced = spec.reduction is not None and spec.reduction.is_traced
        self.registers = registers_of(self.reduce)
        remember = None if spec.reduction is None else spec.reduction.remember
        self.remembered = ()
        if remember is not None:
            self.remembered = remember.encoder_layers(len(spec.vision.layers))

    def forward(
        self, pixels: Tensor, tables: GridTables | None = None, grid: Grid | None = None
    ) -> Seen:
        """Map pixels [N, ...] of a grid to features [N, rows, out_width]; with `tables`, N is 1.

        With the features come the probes that stages ask for.
        """
        grid = self.spec.grids[0] if grid is None else grid
        rows = self.entered(pixels, tables, grid)
        for index in range(len(self.layers)):
            rows = self.step(index, rows, tables, grid)
        features = [rows.kept[index] for index in self.spec.feature_layers]
        if self.norm is not None:
            last = len(self.layers)
            features = [
                self.norm(x) if index == last else x
                for index, x in zip(self.spec.feature_layers, features, strict=True)
            ]
        x = features[0] if len(features) == 1 else torch.cat(features, dim=-1)
        if self.spec.drop_first_row:
            x = x[:, 1:]
        if tables is not None:
            x = x.index_select(1, tables.inverse)
        registers = None
        if self.registers is not None:
            count = self.registers.rows.shape[0]
            x, registers = x[:, :-count], x[:, -count:]
        if len(self.merges):
            tokens = replace(rows.tokens, features=x)
            if tokens.grid is None:
                # Merging leaves halves one behind the other: back to the order of the picture.
                tokens = in_order(tokens, dense=self._merge_in(grid).dense)
        elif len(self.drops):
            tokens = replace(rows.tokens, features=x)
        else:
            tokens = self._in_raster(x, grid)
        view = View(tokens=tokens, probes=rows.probes, registers=registers)
        left = run_stages(self.reduce, view, grid)
        return Seen(tokens=left, probes=rows.probes, whole=tokens, fine=self._fine(rows))

    def _fine(self, rows: VisionRows) -> Tensor | None:
        """Outputs [N, patches, C] of the layers that the decoder looks at again, side by side."""
        if not self.remembered:
            return None
        first = int(self.spec.class_token)
        last = first + rows.tokens.features.shape[1]
        return torch.cat([rows.kept[layer][:, first:last] for layer in self.remembered], -1)

    def entered(self, pixels: Tensor, tables: GridTables | None, grid: Grid) -> VisionRows:
        """Rows as they come to the first layer."""
        x: Tensor = self.embed(pixels)
        if tables is not None:
            x = x.index_select(1, tables.order)
        first, last = int(self.spec.class_token), x.shape[1]
        if self.registers is not None:
            x = torch.cat([x, self.registers.rows.expand(x.shape[0], -1, -1)], dim=1)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        tokens = self._in_raster(x[:, first:last], grid)
        if len(self.drops):
            tokens = run_stages(self.drops, View(tokens=tokens), grid)
            x = torch.cat([x[:, :first], tokens.features], dim=1)
        return VisionRows(x=x, tokens=tokens, probes={}, kept={0: x})

    def _in_raster(self, x: Tensor, grid: Grid) -> VisSeq[Tensor]:
        """Patches [N, rows, W] that nothing has been done to."""
        lie = grid if self.spec.pixels == "image" else None
        return in_raster(x, lie, traced=self.traced)

    def step(
        self, index: int, rows: VisionRows, tables: GridTables | None, grid: Grid
    ) -> VisionRows:
        """Pass one layer, and the stage in it where there is one."""
        layer, first = self.layers[index], int(self.spec.class_token)
        assert isinstance(layer, Layer)
        source = self._keys(layer.spec.mixer, tables)
        if rows.tokens.sizes is not None:
            source = WeightedRows(_with_class(rows.tokens.sizes, first))
        module = self._stage_in(index, grid)
        if self.registers is not None:
            assert module is None, "checked when the stages were sized"
            return rows.after(index, layer(rows.x, source, given=self.registers.given(index)))
        if module is None and index not in self.watched:
            return rows.after(index, layer(rows.x, source))
        watched = Watched(source)
        if module is None:
            x = layer(rows.x, watched)
        else:
            stage = _Between(module, grid, rows.tokens, layer, watched, first)
            # A merge looks at the keys of this layer, a transform makes the grid of later ones.
            is_behind = module.stage(grid).transform is not None
            x = layer(rows.x, watched, None if is_behind else stage)
            x = stage(x) if is_behind else x
            rows = replace(rows, tokens=stage.tokens)
        if index in self.watched:
            probe = watched_probe(
                layer.spec.attention,
                watched,
                first=first,
                class_row=0 if first else None,
                order=None if tables is None else tables.inverse,
            )
            rows = replace(rows, probes={**rows.probes, index - len(self.layers): probe})
        return rows.after(index, x)

    def _merge_in(self, grid: Grid) -> Stage:
        """One of the stages in the layers, which are alike in what they may do."""
        module = self.merges[0]
        assert isinstance(module, StageModule)
        return module.stage(grid)

    def _stage_in(self, index: int, grid: Grid) -> StageModule | None:
        """The stage that stands in a layer, if one does."""
        for module in self.merges:
            assert isinstance(module, StageModule)
            if module.stage(grid).layer == index:
                return module
        return None

    @staticmethod
    def _keys(mixer: str, tables: GridTables | None) -> KeySource:
        """What a row of a layer sees."""
        if tables is None:
            return AllRows()
        if mixer == "window_attention":
            return WindowRows(tables.cos, tables.sin, tables.windows)
        return WindowRows(tables.cos, tables.sin, ((1, tables.order.shape[0]),))


class _Between:
    """A stage in a layer, whose keys it may look at."""

    def __init__(
        self,
        module: StageModule,
        grid: Grid,
        tokens: VisSeq[Tensor],
        layer: Layer,
        watched: Watched,
        first: int,
    ) -> None:
        """Hold what the stage is shown besides the rows."""
        self.module, self.grid, self.tokens = module, grid, tokens
        self.layer, self.watched, self.first = layer, watched, first

    def __call__(self, x: Tensor) -> Tensor:
        """Make rows [N, T, W] fewer; the class token, the first, stays."""
        probe = watched_probe(
            self.layer.spec.attention, self.watched, first=self.first, class_row=None, order=None
        )
        tokens = replace(self.tokens, features=x[:, self.first :])
        self.tokens = self.module(View(tokens=tokens, probes={"own": probe}), self.grid)
        return torch.cat([x[:, : self.first], self.tokens.features], dim=1)


def _with_class(sizes: Tensor, first: int) -> Tensor:
    """Sizes [N, T] with that of the class token."""
    return torch.cat([sizes[:, :first] * 0.0 + 1.0, sizes], dim=1)


def grid_tables(spec: VisionSpec, grid: tuple[int, int]) -> GridTables | None:
    """The tables of a grid, or None where the encoder has a table of positions instead."""
    if spec.position != "rotary":
        return None
    merge, (height, width) = spec.merge, grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    # Patches arrive square by square: [h / m, w / m, m, m].
    squares = (height // merge, merge, width // merge, merge)
    rows, columns = (x.reshape(squares).transpose(1, 2).flatten() for x in (rows, columns))

    window = rows // spec.window * -(-width // spec.window) + columns // spec.window
    counts = torch.bincount(window)
    # Big windows first, in raster order among equals; rows of a window keep their order.
    order = torch.argsort(window, stable=True)
    order = order[torch.argsort(counts[window[order]], descending=True, stable=True)]
    sizes, numbers = torch.unique(counts, return_counts=True)
    windows = tuple(zip(numbers.flip(0).tolist(), sizes.flip(0).tolist(), strict=True))

    pairs = spec.layers[0].attention.head_dim // 4
    exponents = torch.arange(0, 2 * pairs, 2, dtype=torch.float32) / (2 * pairs)
    inv_freq = 1.0 / spec.rotary_theta**exponents
    places = torch.stack([rows, columns], dim=1)[order].float()
    angles = (places[:, :, None] * inv_freq).flatten(1)
    return GridTables(
        order=order,
        inverse=torch.argsort(order),
        cos=angles.cos(),
        sin=angles.sin(),
        windows=windows,
    )


def bucketed_rows(grid: tuple[int, int]) -> list[int] | None:
    """The table rows that the patches of a whole tile use in Idefics3; None is all in order.

    transformers sorts a patch's place, as a fraction of the tile, into buckets in float32. For some
    grids (19, 25, 29, ...) rounding takes a patch for its neighbour, so the same torch operations
    must decide here.
    """
    side = grid[0]
    with torch.device("cpu"):
        borders = torch.arange(1 / side, 1.0, 1 / side)
        places = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
        buckets = torch.bucketize(torch.clamp(places, max=1.0 - 1e-6), borders, right=True)
        rows: list[int] = (buckets[:, None] * side + buckets).flatten().tolist()
    return None if rows == list(range(side**2)) else rows
