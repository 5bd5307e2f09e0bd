"""The stages of a reduction as modules, so that what they compute has a site and is captured.

A stage has no weights of its own unless its pieces are learned ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from edgevlm.model.attention import Watched
from edgevlm.model.fusion import Fusion
from edgevlm.model.learning import Learning
from edgevlm.model.remember import by_windows
from edgevlm.model.spec import AttentionSpec, VlmSpec
from edgevlm.reduce.apply import apply_stage, chosen_rows
from edgevlm.reduce.lattice import centres
from edgevlm.reduce.members import member_places
from edgevlm.reduce.piece import Site
from edgevlm.reduce.plan import Stage
from edgevlm.reduce.remembering import window
from edgevlm.reduce.seq import Probe, VisSeq
from edgevlm.reduce.view import Call, View
from edgevlm_export.ops import kept_rows

Grid = tuple[int, int]
NEVER = -1e9
"""A likeness that softmax makes nothing of."""


class StageModule(Learning):
    """One stage, for every patch grid of the model."""

    def __init__(self, stages: Mapping[Grid, Stage], spec: VlmSpec) -> None:
        """Hold the stage as it was sized for each grid of a model."""
        super().__init__(next(iter(stages.values())), spec)
        self.stages = dict(stages)

    def stage(self, grid: Grid | None = None) -> Stage:
        """The stage of a grid; of any, where it is the same for all."""
        return next(iter(self.stages.values())) if grid is None else self.stages[grid]

    def forward(self, view: View[Tensor], grid: Grid | None = None) -> VisSeq[Tensor]:
        """The tokens that leave."""
        return apply_stage(self.stage(grid), self.taught(view))


def stage_modules(spec: VlmSpec, *sites: Site) -> nn.ModuleList:
    """The stages at some sites, in order; none where the model has no reduction.

    A picture is made smaller before the model sees it, which is no stage of its own.
    """
    reduction = spec.reduction
    if reduction is None:
        return nn.ModuleList()
    by_grid = {
        grid: [
            stage
            for stage in reduction.of(grid, *sites)
            if stage.at != "input" or stage.transform is None
        ]
        for grid, _ in reduction.stages
    }
    count = max(len(stages) for stages in by_grid.values())
    return nn.ModuleList(
        StageModule({grid: stages[index] for grid, stages in by_grid.items()}, spec)
        for index in range(count)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a vision encoder makes of pictures, with what later stages may look at.

    `tokens` are the features [N, rows, out_width], `whole` those before stages behind the encoder;
    `probes` the queries and keys of the layers that stages look at, `fine` [N, patches, C] outputs
    of several layers side by side, where the decoder looks at them again.
    """

    tokens: VisSeq[Tensor]
    probes: Mapping[int | str, Probe[Tensor]]
    whole: VisSeq[Tensor]
    fine: Tensor | None = None


def probe_of(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    *,
    first: int = 0,
    class_row: int | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
    order: Tensor | None = None,
) -> Probe[Tensor]:
    """A probe of a layer's queries and keys."""
    cos, sin = (None, None) if angles is None else angles
    return Probe(
        q=q,
        k=k,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        scale=spec.scale,
        first=first,
        class_row=class_row,
        cos=cos,
        sin=sin,
        order=order,
    )


def watched_probe(
    spec: AttentionSpec,
    watched: Watched,
    *,
    first: int,
    class_row: int | None,
    order: Tensor | None,
) -> Probe[Tensor]:
    """The probe of a layer that was watched."""
    assert watched.q is not None
    assert watched.k is not None
    return probe_of(spec, watched.q, watched.k, first=first, class_row=class_row, order=order)


def in_raster(features: Tensor, grid: Grid | None, *, traced: bool = False) -> VisSeq[Tensor]:
    """Tokens that nothing has been done to; where they are `traced`, their way is followed."""
    batch, count, _ = features.shape
    places = torch.arange(count).expand(batch, count)
    way = places if traced else None
    return VisSeq(features=features, places=places, grid=grid, provenance=way)


def run_stages(modules: nn.ModuleList, view: View[Tensor], grid: Grid) -> VisSeq[Tensor]:
    """Pass tokens through the stages of a site, one after the other."""
    for module in modules:
        assert isinstance(module, StageModule)
        tokens = module(view, grid)
        # Scores of patches that are gone have no rows: later stages of a site see tokens alone.
        view = replace(view, tokens=tokens, probes={}, squares=None)
    return view.tokens


def watched_layers(spec: VlmSpec) -> frozenset[int]:
    """The encoder layers that stages look at, counted from 0."""
    if spec.reduction is None:
        return frozenset()
    stages = [stage for _, stages in spec.reduction.stages for stage in stages]
    asked = frozenset[int]().union(*(stage.layers for stage in stages))
    return frozenset(layer % len(spec.vision.layers) for layer in asked)


def squares_of(spec: VlmSpec, grid: Grid) -> Tensor | None:
    """The patches [N, m * m] that each visual token is made of; None where it is one of them."""
    merge = spec.projector.merge
    if merge == 1:
        return None
    patches = torch.arange(grid[0] * grid[1])
    if spec.vision.pixels == "patches":
        return patches.reshape(-1, merge**2)
    squares = patches.reshape(grid[0] // merge, merge, grid[1] // merge, merge)
    return squares.transpose(1, 2).reshape(-1, merge**2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """The text rows of a prompt [1, Q, W], and by kind how much each asks [1, Q]."""

    rows: Tensor
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def project(
    spec: VlmSpec,
    projector: nn.Module,
    stages: nn.ModuleList,
    seen: Seen,
    grid: Grid,
    question: Asking | None,
    fusion: Fusion | None = None,
) -> VisSeq[Tensor]:
    """What a vision encoder saw in pictures of a grid, as rows of the decoder [N, tokens, W].

    With a `fusion` the rows of text come along, which have seen the pictures.
    """
    encoded, merge = seen.tokens, spec.projector.merge
    here = encoded.grid or grid
    rows = projector(encoded.features, here)
    if merge == 1:
        tokens = replace(encoded, features=rows)
    else:
        is_whole = spec.token_grid(grid) is not None
        lie = (here[0] // merge, here[1] // merge) if is_whole else None
        is_traced = spec.reduction is not None and spec.reduction.is_traced
        tokens = in_raster(rows, lie, traced=is_traced)
        if here != grid:
            # Squares of a coarser grid stand for those that lie at their middles.
            old, new = ((side[0] // merge, side[1] // merge) for side in (grid, here))
            tokens = replace(tokens, places=tokens.places * 0 + torch.tensor(centres(old, new)))
    view = View(
        tokens=tokens,
        probes=seen.probes,
        encoded=encoded.features,
        squares=squares_of(spec, here),
        question=None if question is None else question.rows,
        asked={} if question is None else question.weights,
    )
    found = run_stages(stages, view, grid)
    if seen.fine is not None:
        lie, _ = window(spec, grid)
        found = replace(found, fine=by_windows(seen.fine, grid, lie))
    if fusion is None:
        return found
    assert question is not None, "where text is fused there is text"
    whole = rows if seen.whole is encoded else projector(seen.whole.features, grid)
    fused = fusion(whole, found.features, question.rows, question.weights["text"])
    return replace(found, features=fused.tokens, text=fused.text)


def token_offsets(spec: VlmSpec, grid: Grid, tokens: VisSeq[Tensor]) -> Tensor:
    """How far tokens [N, k] stand behind the beginning of their picture: [N, k, A] for A axes."""
    assert spec.reduction is not None
    policy, places = spec.reduction.positions, tokens.places[..., None]
    if policy is not None and policy.ppe is not None:
        assert tokens.provenance is not None
        places = member_places(tokens.provenance, tokens.places.shape[1], policy.num_places)
    axes = [places]
    if spec.rule_axes > 1:
        shape = spec.token_grid(grid)
        assert shape is not None, "three axes are those of a grid"
        down = _row_numbers(places, shape)
        axes = [places * 0, down, places - down * shape[1]]
    offsets = torch.cat(axes, -1).to(torch.float32)
    if policy is not None and policy.v2pe is not None:
        offsets = (offsets + 1.0) * policy.v2pe.step - 1.0
    return offsets


def _row_numbers(places: Tensor, grid: Grid) -> Tensor:
    """The rows of a grid that places lie in: the quotient, which is no op of every target."""
    if grid[0] == 1:
        return places * 0
    begins = torch.arange(1, grid[0]) * grid[1]
    return (places[..., None] >= begins).sum(-1)


def visual_tokens(call: Call[Tensor], stage: Stage) -> VisSeq[Tensor]:
    """The visual tokens [P, N, W] that stand in the rows of a call before a stage."""
    count = stage.count_in
    rows = call.starts[:, None] + torch.arange(count)
    features = call.rows[0].index_select(0, rows.flatten()).unflatten(0, (-1, count))
    places = torch.arange(count).expand(features.shape[0], count)
    return VisSeq(features=features, places=places, grid=stage.grid_in)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """Where visual tokens stand in a prompt, and which of its rows ask about them.

    `starts` [P] int64 are the rows where picture groups begin, `last` [1] is the prompt's last row,
    and `weights` [1, T] by kind (`text`, `question`, `words`) how much each row asks. `fine`
    [P, patches, C] are the features that visual tokens look at again.
    """

    starts: Tensor
    last: Tensor
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    fine: Tensor | None = None

    def call(self, rows: Tensor) -> Call[Tensor]:
        """With the rows [1, T, W] that enter a layer."""
        return Call(rows=rows, starts=self.starts, last=self.last, weights=self.weights)

    def narrowed(self, rows: Tensor, dropped: int) -> Pictures:
        """After all rows but some are taken away, `dropped` of each picture group."""
        before = torch.arange(self.starts.shape[0]) * dropped
        return Pictures(
            starts=self.starts - before,
            last=self.last - self.starts.shape[0] * dropped,
            weights={kind: given.index_select(1, rows) for kind, given in self.weights.items()},
        )

    def with_raters(self, rows: Tensor, count: int) -> Pictures:
        """With the weights of the words that look at the pictures most (SparseVLM).

        A visual token looks at words as their embeddings `rows` [1, T, W] are alike; words that get
        more than an even share of all looks ask, alike.
        """
        asked = self.weights["question"]
        places = (self.starts[:, None] + torch.arange(count)).flatten()
        likeness = rows[0].index_select(0, places) @ rows[0].mT
        likeness = torch.where(asked > 0, likeness, NEVER)
        looks = likeness.softmax(-1).mean(0, keepdim=True) * asked.sum()
        # Where all get an even share, none gets more: the word that gets most asks in any case.
        asks = (looks > 1.0) | (looks == looks.amax(-1, keepdim=True))
        return replace(self, weights={**self.weights, "raters": asks.to(rows.dtype)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """What a stage between two layers leaves of the rows of a call.

    `rows` [T'] are those that go on. Where the stage makes tokens of others, `tokens` [P, k, W]
    take the place of the visual rows among them.
    """

    rows: Tensor
    tokens: Tensor | None = None


class DeepModule(Learning):
    """A stage within the decoder, which is the same for every grid."""

    def __init__(self, stage: Stage, spec: VlmSpec) -> None:
        """Hold the stage, for a model."""
        super().__init__(stage, spec)
        self.stage = stage

    @property
    def looks_back(self) -> bool:
        """Whether it looks at what the layer before it attended with."""
        return any(piece.looks_back for piece in self.stage.pieces)

    @property
    def looks_here(self) -> bool:
        """Whether it looks at what the layer behind it would attend with."""
        return any(piece.looks_here for piece in self.stage.pieces)

    @property
    def looks_normed(self) -> bool:
        """Whether it looks at rows as the decoder's last norm makes them."""
        return any(piece.looks_normed for piece in self.stage.pieces)


class CutModule(DeepModule):
    """A stage between two layers of the decoder, where fewer tokens leave than come."""

    def forward(self, view: View[Tensor]) -> Left:
        """The rows of the call that go on, and the tokens it makes where it does."""
        stage, call = self.stage, view.call
        assert call is not None
        view = self.taught(view)
        first, tokens = call.starts[:, None], None
        if not stage.count_out:
            kept = first[:, :0]
        elif stage.makes_tokens:
            tokens = apply_stage(stage, view).features
            # As many rows as there are tokens, whichever: none of them stays what it was.
            kept = first * 0 + torch.arange(stage.count_out)
        else:
            _, kept = chosen_rows(stage, view)
        return Left(rows=kept_rows(kept, call.starts, call.rows, stage.count_in), tokens=tokens)


def with_tokens(x: Tensor, starts: Tensor, tokens: Tensor) -> Tensor:
    """Rows x [1, T, W] with tokens [P, k, W] in place of the k rows from each of `starts` [P]."""
    num_pictures, count, _ = tokens.shape
    numbers = torch.arange(x.shape[1])
    places = numbers[:, None] - starts
    is_visual = (places >= 0) & (places < count)
    # All tokens lie before all rows, those of picture p from p * k on.
    of_tokens = ((places + torch.arange(num_pictures) * count) * is_visual).sum(-1)
    rows = torch.where(is_visual.sum(-1) > 0, of_tokens, numbers + num_pictures * count)
    return torch.cat([tokens.flatten(0, 1), x[0]]).index_select(0, rows)[None]


def cut_modules(spec: VlmSpec) -> nn.ModuleList:
    """The stages within the decoder."""
    reduction = spec.reduction
    cuts = () if reduction is None else reduction.cuts
    return nn.ModuleList(CutModule(stage, spec) for stage in cuts)
