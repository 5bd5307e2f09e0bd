"""The decoder: layers over rows, and the stages that take visual tokens away or let them skip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgevlm.model.attention import TurnedSource, Watched, unpacked
from edgevlm.model.layers import Layer
from edgevlm.model.norms import build_norm
from edgevlm.model.remember import Remember
from edgevlm.model.skips import SkipModule, with_passed
from edgevlm.model.spec import DecoderSpec
from edgevlm.model.stages import (
    CutModule,
    DeepModule,
    Pictures,
    probe_of,
    visual_tokens,
    with_tokens,
)
from edgevlm.reduce.seq import Probe
from edgevlm.reduce.view import View
from edgevlm_export.ops import logits


class Head(nn.Linear):
    """Rows to logits; in a graph the weight keeps its layout, which a tied table shares."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., W] to [..., V]."""
        return logits(x, self.weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of a decoder call between two layers.

    `x` [1, T, W]. `wanted` are those that logits are wanted for, None for all. `pictures` says
    where visual tokens stand, None where none may be taken away. `before` is what the layer before
    attended with, where a stage looks back at it.
    """

    x: Tensor
    wanted: Tensor | None
    pictures: Pictures | None = None
    before: Probe[Tensor] | None = None


class Decoder(nn.Module):
    """Layers, norm and head, and the stages that take visual tokens away or let them skip layers.

    `cuts` stand between layers, `skips` in one each; before some of them tokens look at the picture
    again (`remembers`).
    """

    def __init__(self, spec: DecoderSpec) -> None:
        """Build the layers as their specs say."""
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList(Layer(spec.width, layer) for layer in spec.layers)
        self.norm = build_norm(spec.width, spec.norm)
        self.head: nn.Module = Head(spec.width, spec.vocab_size, bias=False)
        self.cuts = nn.ModuleList()
        self.skips = nn.ModuleList()
        self.remembers = nn.ModuleDict()

    def forward(
        self,
        x: Tensor,
        keys: Sequence[TurnedSource],
        logit_rows: Tensor | None = None,
        pictures: Pictures | None = None,
    ) -> Tensor:
        """Map rows [1, T, W] to logits [1, T, V], or [1, R, V] of the rows wanted.

        `keys` has one source per layer. With `pictures` the rows are a whole prompt, perhaps with
        an answer, of which stages take visual tokens away; without, all rows pass all layers.
        """
        rows = self.entered(x, logit_rows, pictures)
        for index in range(len(self.layers)):
            rows = self.step(index, rows, keys)
        x = rows.x
        if rows.wanted is not None:
            x = x.index_select(1, rows.wanted)
        out: Tensor = self.head(self.norm(x))
        return out

    def entered(self, x: Tensor, logit_rows: Tensor | None, pictures: Pictures | None) -> Rows:
        """Rows as they come to the first layer."""
        cuts = [cut.stage for cut in self.cuts if isinstance(cut, CutModule)]
        if not cuts and not len(self.skips) and not len(self.remembers):
            pictures = None
        if pictures is not None and any("raters" in cut.queries for cut in cuts):
            pictures = pictures.with_raters(x, cuts[0].count_in)
        return Rows(x=x, wanted=logit_rows, pictures=pictures)

    def step(self, index: int, rows: Rows, keys: Sequence[TurnedSource]) -> Rows:
        """Pass one layer, and the stage before it where there is one."""
        layer, source = self.layers[index], keys[index]
        assert isinstance(layer, Layer)
        if rows.pictures is None:
            return replace(rows, x=layer(rows.x, source))
        if str(index) in self.remembers:
            rows = replace(rows, x=self._remembered(index, rows.x, rows.pictures))
        for skip in self.skips:
            assert isinstance(skip, SkipModule)
            if skip.stage.layer == index:
                return replace(rows, x=self._passed(skip, index, rows, keys))
        cut, following = self._cut_before(index), self._cut_before(index + 1)
        if cut is not None:
            rows = self._narrowed(cut, index, rows, keys)
        if following is None or not following.looks_back:
            return replace(rows, x=layer(rows.x, source))
        watched = Watched(source)
        x = layer(rows.x, watched)
        assert watched.q is not None
        assert watched.k is not None
        tables = source.angles.cos, source.angles.sin
        before = probe_of(layer.spec.attention, watched.q, watched.k, angles=tables)
        return replace(rows, x=x, before=before)

    def _remembered(self, index: int, x: Tensor, pictures: Pictures) -> Tensor:
        """Rows [1, T, W] whose visual tokens have seen their patches again."""
        module = self.remembers[str(index)]
        assert isinstance(module, Remember)
        assert pictures.fine is not None, "a prompt with pictures has features of their patches"
        count = pictures.fine.shape[1] // module.patches
        rows = pictures.starts[:, None] + torch.arange(count)
        tokens = x[0].index_select(0, rows.flatten()).unflatten(0, (-1, count))
        return with_tokens(x, pictures.starts, module(tokens, pictures.fine))

    def _passed(
        self, skip: SkipModule, index: int, rows: Rows, keys: Sequence[TurnedSource]
    ) -> Tensor:
        """Rows [1, T, W] behind a layer that some of them skip, at the positions they have."""
        layer, source, pictures = self.layers[index], keys[index], rows.pictures
        assert isinstance(layer, Layer)
        assert pictures is not None
        # The first layer sees all rows, and turns them as they stand.
        tables = keys[0].angles.cos, keys[0].angles.sin
        found = skip(self._view(skip, index, rows, pictures, tables))
        source.angles.follow(tables, found.rows)
        weights = found.attention, found.mlp
        if found.rows is None:
            whole: Tensor = layer(rows.x, source, weights=weights)
            return whole
        passed = layer(rows.x.index_select(1, found.rows), source, weights=weights)
        return with_passed(found.skipped, found.rows, passed)

    def _cut_before(self, index: int) -> CutModule | None:
        """The stage before a layer, if one stands there."""
        for module in self.cuts:
            assert isinstance(module, CutModule)
            if module.stage.layer == index:
                return module
        return None

    def _narrowed(
        self, cut: CutModule, index: int, rows: Rows, keys: Sequence[TurnedSource]
    ) -> Rows:
        """The rows that a stage leaves; the layers behind it turn as these do."""
        pictures, stage = rows.pictures, cut.stage
        assert pictures is not None
        above, angles = keys[index - 1].angles, keys[index].angles
        tables = above.cos, above.sin
        if stage.count_in == stage.count_out:
            angles.follow(tables)
            return replace(rows, before=None)
        left = cut(self._view(cut, index, rows, pictures, tables))
        angles.follow(tables, left.rows)
        x, wanted = rows.x.index_select(1, left.rows), rows.wanted
        if wanted is not None:
            # -1 stays the last row, others move up by what is gone before them.
            moved = (left.rows < wanted[:, None]).sum(-1)
            wanted = torch.where(wanted < 0, wanted, moved)
        pictures = pictures.narrowed(left.rows, stage.count_in - stage.count_out)
        if left.tokens is not None:
            x = with_tokens(x, pictures.starts, left.tokens)
        return Rows(x=x, wanted=wanted, pictures=pictures)

    def _view(
        self,
        cut: DeepModule,
        index: int,
        rows: Rows,
        pictures: Pictures,
        tables: tuple[Tensor, Tensor],
    ) -> View[Tensor]:
        """What a stage before a layer is shown."""
        layer = self.layers[index]
        assert isinstance(layer, Layer)
        probes: dict[int | str, Probe[Tensor]] = {}
        if cut.looks_here:
            spec = layer.spec.attention
            q, k, _ = unpacked(spec, *layer.attention.project(layer.norm1(rows.x)))
            probes["own"] = probe_of(spec, q, k, angles=tables)
        if rows.before is not None:
            probes["previous"] = rows.before
        call = pictures.call(rows.x)
        return View(
            tokens=visual_tokens(call, cut.stage),
            probes=probes,
            call=call,
            # Past its hooks: what the norm gives the model is the rows that leave the last layer.
            normed=self.norm.forward(rows.x) if cut.looks_normed else None,
        )
