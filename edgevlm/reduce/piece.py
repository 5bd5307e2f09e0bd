"""What a piece is, and the registry that recipes look names up in.

A piece is its options: a frozen model whose `name` is its key in a recipe. Reading one needs no
torch; `torch` below is the function that runs and is exported, `numpy` its twin by definition.

Static classes (`static_class`), which say what a target must be able to do:

    S0  a linear map that depends on no data         S3  a mask or positions of a fixed shape
    S1  a choice that depends on data, fixed in      D1  a number of tokens that depends on data:
        number: TopK and Gather                          refused without calibration
    S2  a loop of a fixed number of steps            D2  control by the host, between two graphs
"""

from __future__ import annotations

import importlib.metadata
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PlainSerializer,
    create_model,
    model_validator,
)

from edgevlm.document import Complaint, Options, show, suggest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from edgevlm.reduce.extent import Extent
    from edgevlm.reduce.learned import Weight
    from edgevlm.reduce.seq import VisSeq
    from edgevlm.reduce.view import View
    from edgevlm.reduce.weighing import Weighing

__all__ = ["Piece", "Scorer", "StaticClass", "named", "plugins"]

StaticClass = Literal["S0", "S1", "S2", "S3", "D1", "D2"]
Site = Literal["input", "encoder.layers", "encoder", "projector", "decoder"]
SITES: tuple[Site, ...] = ("input", "encoder.layers", "encoder", "projector", "decoder")
"""Where a stage may stand, in the order in which tokens pass."""

PieceT = TypeVar("PieceT", bound="Piece")


class Piece(Options):
    """One named part of a stage.

    `sites` are those it can stand at. `needs` are what it looks at besides the tokens: `class`
    (a class token), `attention` (queries and keys of a layer), `question` (text rows), `encoded`
    (the encoder's features of the tokens), `grid` (tokens in raster order on a whole grid),
    `registers` (learned rows beside the patches). `ops`
    are those of TopK, Gather and ArgMax that it has no form without, so that a processor that lacks
    one cannot run it; a loop (class S2) has none without any of them.
    """

    name: ClassVar[str]
    static_class: ClassVar[StaticClass]
    sites: ClassVar[tuple[Site, ...]] = SITES
    ops: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str] = ""
    is_learned: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """What it looks at besides the tokens."""
        return frozenset()

    @property
    def layers(self) -> frozenset[int]:
        """Layers of the encoder whose queries and keys it looks at, -1 for the last."""
        return frozenset()

    @property
    def looks_back(self) -> bool:
        """Whether it looks at queries and keys of the decoder layer before it."""
        return False

    @property
    def looks_here(self) -> bool:
        """Whether it looks at those of the decoder layer behind it."""
        return False

    @property
    def looks_normed(self) -> bool:
        """Whether it looks at the rows of a decoder call as the decoder's last norm makes them."""
        return False

    @property
    def asks(self) -> frozenset[str]:
        """Kinds of text rows whose weights it wants, besides the last row."""
        return frozenset({getattr(self, "query", "last")} - {"last"})

    @property
    def is_calibrated(self) -> bool:
        """Whether a number of tokens that depends on data (class D1) was made a constant."""
        return False

    def macs(self, extent: Extent) -> int:
        """Multiply-adds of its products; what is no product is not counted."""
        return 0

    def weights(self, extent: Extent) -> Mapping[str, Weight]:
        """What it has learned, by name, where it `is_learned`."""
        return {}


class Scorer(Piece):
    """A number for each token: the larger, the rather it is kept."""

    @abstractmethod
    def torch(self, view: View[Tensor]) -> Tensor:
        """Scores [B, N] float32."""

    @abstractmethod
    def numpy(self, view: View[np.ndarray]) -> np.ndarray:
        """The twin of `torch`."""


class Choice(Piece):
    """A selector: which tokens are kept, a fixed number of them.

    One that goes `by_score` needs a scorer in its stage.
    """

    sites: ClassVar[tuple[Site, ...]] = ("encoder", "projector", "decoder")
    by_score: ClassVar[bool] = False

    @abstractmethod
    def torch(self, view: View[Tensor], scores: Tensor | None, count: int) -> Tensor:
        """Rows [B, count] int64 of the tokens kept, ascending."""

    @abstractmethod
    def numpy(self, view: View[np.ndarray], scores: np.ndarray | None, count: int) -> np.ndarray:
        """The twin of `torch`."""


class Rest(Piece):
    """What becomes of the tokens that were not chosen, beyond being dropped.

    It goes `by_score`, as a selector may; `scorers` are those it can work with, where not all will
    do.
    """

    by_score: ClassVar[bool] = True
    scorers: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def extra(self, keep: int, num_tokens: int) -> int:
        """How many tokens it makes, of the `keep` that leave a stage."""

    @abstractmethod
    def torch(self, view: View[Tensor], scores: Tensor, kept: Tensor, extra: int) -> VisSeq[Tensor]:
        """The tokens that leave the stage: those kept [B, k], and `extra` made of the rest."""

    @abstractmethod
    def numpy(
        self, view: View[np.ndarray], scores: np.ndarray, kept: np.ndarray, extra: int
    ) -> VisSeq[np.ndarray]:
        """The twin of `torch`."""


class Merge(Piece):
    """Fewer tokens are made of all: those that are alike become one, or learned rows look at them.

    `is_ordered` says that they leave in the order of their places.
    """

    is_ordered: ClassVar[bool] = False

    def fit(self, num_tokens: int, count: int) -> int:
        """How many of so many tokens can leave, where a budget has room for `count`."""
        return count

    def check(self, num_tokens: int, count: int) -> None:
        """Raise Complaint where so many tokens cannot become so few."""

    @abstractmethod
    def torch(self, view: View[Tensor], count: int) -> VisSeq[Tensor]:
        """The `count` tokens that leave the stage."""

    @abstractmethod
    def numpy(self, view: View[np.ndarray], count: int) -> VisSeq[np.ndarray]:
        """The twin of `torch`."""


class Transform(Piece):
    """A linear map of the grid that depends on no data."""

    static_class: ClassVar[StaticClass] = "S0"

    @property
    def needs(self) -> frozenset[str]:
        """The grid."""
        return frozenset({"grid"})

    def macs(self, extent: Extent) -> int:
        """One side is mapped, then the other."""
        assert extent.grid_in is not None
        assert extent.grid_out is not None
        (height, width), (rows, columns) = extent.grid_in, extent.grid_out
        return rows * width * extent.width * (height + columns)

    @abstractmethod
    def grid(self, grid: tuple[int, int], count: int) -> tuple[int, int]:
        """The grid of at most `count` tokens that it makes of a grid; Complaint where it cannot."""

    def steps(self, grid: tuple[int, int], count: int) -> tuple[tuple[int, int], ...]:
        """The grids that it makes one behind the other, where it stands in layers."""
        return (self.grid(grid, count),)

    @abstractmethod
    def matrix(self, old: int, new: int) -> np.ndarray:
        """The map [new, old] float64 along one side; both sides are mapped, one after the other."""


class Skip(Piece):
    """What a layer makes of the tokens that pass it, and of those that skip it.

    It goes by the scores that choose which pass; `scorers` are those it can weigh with.
    """

    static_class: ClassVar[StaticClass] = "S1"
    sites: ClassVar[tuple[Site, ...]] = ("decoder",)
    scorers: ClassVar[tuple[str, ...]] = ("router",)

    @abstractmethod
    def torch(self, scores: Tensor) -> Weighing[Tensor]:
        """How much tokens of scores [P, N] get of what the layer adds."""

    @abstractmethod
    def numpy(self, scores: np.ndarray) -> Weighing[np.ndarray]:
        """The twin of `torch`."""


class Schedule(Piece):
    """Which layers of the decoder tokens may skip.

    One that `says_share` says too how many pass each, for a budget or, where it `is_fixed`, without
    one; otherwise these are as many as the stage keeps.
    """

    sites: ClassVar[tuple[Site, ...]] = ("decoder",)
    says_share: ClassVar[bool] = False

    @property
    def is_fixed(self) -> bool:
        """Whether its shares are given, and no budget can change them."""
        return not self.says_share

    @abstractmethod
    def shares(self, num_layers: int, x: float | None) -> Mapping[int, float | None]:
        """The layers, never the first, each with the share of tokens that passes it, if it says so.

        `x` is the unknown of a budget: more layers may be skipped where it is 0 than elsewhere, and
        most tokens pass where it is 1. None is for what was published. Complaint where there is no
        such layer.
        """


def plugins() -> None:
    """Import the modules that installed packages name under the entry point `edgevlm.reduce`."""
    for entry in importlib.metadata.entry_points(group="edgevlm.reduce"):
        entry.load()


_KINDS: dict[str, dict[str, type[Piece]]] = {}


def register(kind: type[PieceT]) -> type[PieceT]:
    """Make a piece known by its name, as a decorator; a name that is taken is an error."""
    family = next(base for base in kind.__mro__ if Piece in base.__bases__)
    known = _KINDS.setdefault(family.__name__, {})
    if known.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"there is a {family.__name__.lower()} {kind.name!r} already")
    return kind


def known(family: type[Any]) -> Mapping[str, type[Piece]]:
    """The pieces of a family, by name."""
    return _KINDS.get(family.__name__, {})


class _Named(Options):
    """A piece as it is written: a mapping whose one key names it, or its name alone."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    @model_validator(mode="before")
    @classmethod
    def _has_one_key(cls, data: object) -> object:
        if isinstance(data, str):
            if data not in cls.model_fields:
                hint = suggest(data, list(cls.model_fields))
                raise Complaint(f"unknown {cls.key_noun} {data!r}", hint=hint)
            data = {data: {}}
        if not isinstance(data, Mapping) or len(data) != 1:
            raise Complaint(
                f"a {cls.key_noun} must be a name, or a mapping with one key, got {show(data)}",
                hint=f"write '{next(iter(cls.model_fields))}: {{}}'",
            )
        return {name: {} if options is None else options for name, options in data.items()}


def _unwrapped(wrapper: BaseModel) -> Piece:
    (name,) = wrapper.model_fields_set
    found: Piece = getattr(wrapper, name)
    return found


def _wrapped(piece: Piece) -> dict[str, Any]:
    return {piece.name: piece.model_dump(mode="json")}


def named(family: type[Any], noun: str) -> Any:
    """The type of a field that holds a piece of a family, of those known by now."""
    fields: dict[str, Any] = {name: (kind, None) for name, kind in known(family).items()}
    model = create_model(f"{family.__name__}Field", __base__=_Named, **fields)
    model.key_noun = noun
    return Annotated[model, AfterValidator(_unwrapped), PlainSerializer(_wrapped)]
