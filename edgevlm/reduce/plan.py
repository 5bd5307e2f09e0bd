"""A reduction worked out for a model: the tokens in and out of every stage, as whole numbers.

Nothing here looks at weights. `Reduction` is part of the spec of a model, and both the model's
stages and its plan are made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgevlm.reduce.fusion import FusionOptions
from edgevlm.reduce.piece import Bottleneck, Choice, Merge, Rest, Scorer, Site, Skip, Transform
from edgevlm.reduce.positions import PositionOptions
from edgevlm.reduce.remembering import RememberOptions

__all__ = ["Reduction", "Segment", "Stage"]

Grid = tuple[int, int]
BEFORE_DECODER: tuple[Site, ...] = ("input", "encoder.layers", "encoder", "projector")
MAIN = "main"
"""The state group of the layers that see every row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage for one picture grid: `count_in` tokens come, `count_out` leave.

    `number` is that of the stage as it was written, from 1. `layer` is the layer it stands before
    in the decoder, or in which it stands in the encoder: a merge in front of its MLP, a transform
    behind it. With `skip` it stands in a layer of the decoder, which `count_out` tokens pass, and
    behind it all are there again. `extra` of the tokens that leave are made by `rest`. `grid_in`
    and `grid_out` are there where tokens lie on a whole grid. `place` is `keep` or `repack`.
    `dense` asks for forms without TopK and Gather.

    Of a bottleneck `count_out` are the rows that it puts behind the `count_in` tokens, which pass
    the decoder with them and are no longer seen from behind.
    """

    at: Site
    layer: int | None
    count_in: int
    count_out: int
    grid_in: Grid | None
    grid_out: Grid | None
    place: str
    score: Scorer | None = None
    select: Choice | None = None
    rest: Rest | None = None
    merge: Merge | None = None
    transform: Transform | None = None
    skip: Skip | None = None
    bottleneck: Bottleneck | None = None
    extra: int = 0
    number: int = 1
    dense: bool = False

    @property
    def pieces(self) -> tuple[Any, ...]:
        """Its pieces, in the order in which they work."""
        found = (
            *(self.score, self.select, self.rest, self.skip, self.merge, self.transform),
            self.bottleneck,
        )
        return tuple(piece for piece in found if piece is not None)

    @property
    def needs(self) -> frozenset[str]:
        """What its pieces look at besides the tokens."""
        return frozenset[str]().union(*(piece.needs for piece in self.pieces))

    @property
    def layers(self) -> frozenset[int]:
        """Encoder layers whose queries and keys it looks at, -1 for the last."""
        return frozenset[int]().union(*(piece.layers for piece in self.pieces))

    @property
    def queries(self) -> frozenset[str]:
        """Kinds of text rows that it wants weights of, besides the last row."""
        return frozenset[str]().union(*(piece.asks for piece in self.pieces))

    @property
    def makes_tokens(self) -> bool:
        """Whether tokens leave that are none of those that came."""
        return self.select is None or self.extra > 0

    @property
    def name(self) -> str:
        """What it does, in a word."""
        return "+".join(piece.name for piece in self.pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Decoder layers from `first` to `end` - 1, which keep `tokens` rows of a picture in a state.

    These are the visual tokens that the layers see, unless a bottleneck hides some of them from
    what follows the picture. The state is the group `group`, which segments share that see as many
    rows, be it others in each. `is_packed` says that positions are counted anew at its beginning.
    """

    group: str
    first: int
    end: int
    tokens: int
    is_packed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """The stages of a model, for each of its patch grids, in the order in which tokens pass.

    There may be none, where tokens are given other `positions` alone. `method` is the name they
    were asked by. `dense` asks for forms without TopK and Gather. `merge` is the side of the
    squares of patches that the projector makes tokens of. `pictures` are how many picture groups a
    prompt of fixed shape has at most.
    """

    stages: tuple[tuple[Grid, tuple[Stage, ...]], ...]
    method: str | None = None
    dense: bool = False
    merge: int = 1
    pictures: int = 2
    positions: PositionOptions | None = None
    fusion: FusionOptions | None = None
    remember: RememberOptions | None = None

    def of(self, grid: Grid, *sites: Site) -> tuple[Stage, ...]:
        """The stages at some sites, for a patch grid."""
        return tuple(stage for stage in dict(self.stages)[grid] if stage.at in sites)

    def before(self, grid: Grid) -> tuple[Stage, ...]:
        """The stages before the decoder, for a patch grid."""
        return self.of(grid, *BEFORE_DECODER)

    @property
    def is_traced(self) -> bool:
        """Whether somebody asks which tokens each token was made of."""
        return self.positions is not None and self.positions.ppe is not None

    @property
    def asks(self) -> frozenset[str]:
        """Kinds of text rows that stages want weights of."""
        found = (stage.queries for _, stages in self.stages for stage in stages)
        fused = frozenset[str]() if self.fusion is None else frozenset({"text"})
        return fused.union(*found)

    @property
    def cuts(self) -> tuple[Stage, ...]:
        """The stages between layers of the decoder, which are the same for every grid."""
        deep = self.of(self.stages[0][0], "decoder")
        return tuple(stage for stage in deep if stage.skip is None)

    @property
    def skips(self) -> tuple[Stage, ...]:
        """The stages in layers of the decoder that some tokens skip, the same for every grid."""
        deep = self.of(self.stages[0][0], "decoder")
        return tuple(stage for stage in deep if stage.skip is not None)

    @property
    def bottleneck(self) -> Stage | None:
        """The stage whose rows stand for a picture, which is the same for every grid."""
        found = [stage for stage in self.stages[0][1] if stage.bottleneck is not None]
        return found[0] if found else None

    @property
    def hidden(self) -> int:
        """Rows of a picture that no row behind it sees, and no state keeps."""
        stage = self.bottleneck
        return 0 if stage is None else stage.count_in

    def tokens(self, grid: Grid, dense: int) -> int:
        """Rows of a picture that enter the decoder, of `dense` visual tokens before any stage."""
        before = self.before(grid)
        if not before:
            return dense
        if before[-1].bottleneck is not None:
            return before[-1].count_in + before[-1].count_out
        is_joined = before[-1].at == "projector"
        return before[-1].count_out // (1 if is_joined else self.merge**2)

    def segments(self, num_layers: int, dense: int) -> tuple[Segment, ...]:
        """The runs of decoder layers that see the same rows."""
        cuts = self.cuts
        first_cut = cuts[0].layer if cuts else num_layers
        assert first_cut is not None
        tokens = self.tokens(self.stages[0][0], dense) - self.hidden
        if self.skips:
            return _skipped_segments(self.skips, num_layers, tokens)
        found = [Segment(group=MAIN, first=0, end=first_cut, tokens=tokens)]
        for place, cut in enumerate(cuts):
            assert cut.layer is not None
            end = cuts[place + 1].layer if place + 1 < len(cuts) else num_layers
            assert end is not None
            found.append(
                Segment(
                    group=f"from_{cut.layer}",
                    first=cut.layer,
                    end=end,
                    tokens=cut.count_out,
                    # What is packed once stays so: later layers go on from there.
                    is_packed=cut.place == "repack" or found[-1].is_packed,
                )
            )
        return tuple(found)


def _skipped_segments(skips: Sequence[Stage], num_layers: int, tokens: int) -> tuple[Segment, ...]:
    """A segment for every layer that tokens skip, which are others in each, and for dense runs.

    A state group is named by the first layer that as many tokens pass.
    """
    passing = {skip.layer: skip.count_out for skip in skips}
    begins = [layer for layer in range(num_layers) if {layer, layer - 1} & passing.keys()]
    firsts = [0, *(layer for layer in begins if layer > 0)]
    groups: dict[int | None, str] = {None: MAIN}
    return tuple(
        Segment(
            group=groups.setdefault(passing.get(first), f"from_{first}"),
            first=first,
            end=end,
            tokens=passing.get(first, tokens),
        )
        for first, end in zip(firsts, [*firsts[1:], num_layers], strict=True)
    )


def state_segments(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The first segment of every state group."""
    found: dict[str, Segment] = {}
    for segment in segments:
        found.setdefault(segment.group, segment)
    return tuple(found.values())


def average_tokens(segments: Sequence[Segment]) -> float:
    """Rows of a picture that the layers of the decoder keep, on average."""
    layers = segments[-1].end
    return sum((part.end - part.first) * part.tokens for part in segments) / layers
