"""The encoder of pixels: a ViT with a table of positions, or with 2-D rotation and windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgevlm.model.attention import AllRows, AttentionCore, KeySource, unpacked
from edgevlm.model.layers import Layer
from edgevlm.model.norms import build_norm
from edgevlm.model.spec import VisionSpec
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


class Vision(nn.Module):
    """Pixels to features, one row per patch."""

    def __init__(self, spec: VisionSpec) -> None:
        """Build the layers that the features need."""
        super().__init__()
        self.spec = spec
        self.embed = Embed(spec)
        self.pre_norm = build_norm(spec.width, spec.pre_norm) if spec.pre_norm else None
        self.layers = nn.ModuleList(Layer(spec.width, layer) for layer in spec.layers)
        self.norm = build_norm(spec.width, spec.norm) if spec.norm else None

    def forward(self, pixels: Tensor, tables: GridTables | None = None) -> Tensor:
        """Map pixels [N, ...] to features [N, rows, out_width]; with `tables`, N is 1."""
        x: Tensor = self.embed(pixels)
        if tables is not None:
            x = x.index_select(1, tables.order)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        states = [x]
        for layer in self.layers:
            assert isinstance(layer, Layer)
            states.append(layer(states[-1], self._keys(layer.spec.mixer, tables)))
        if self.norm is not None:
            states[-1] = self.norm(states[-1])
        features = [states[index] for index in self.spec.feature_layers]
        x = features[0] if len(features) == 1 else torch.cat(features, dim=-1)
        if self.spec.drop_first_row:
            x = x[:, 1:]
        return x if tables is None else x.index_select(1, tables.inverse)

    @staticmethod
    def _keys(mixer: str, tables: GridTables | None) -> KeySource:
        """What a row of a layer sees."""
        if tables is None:
            return AllRows()
        if mixer == "window_attention":
            return WindowRows(tables.cos, tables.sin, tables.windows)
        return WindowRows(tables.cos, tables.sin, ((1, tables.order.shape[0]),))


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
