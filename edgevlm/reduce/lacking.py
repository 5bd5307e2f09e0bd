"""What becomes of stages on a device that lacks an op of choosing: another form, or a refusal.

TopK and Gather have forms of comparisons and products, which are used everywhere as soon as one of
them is lacking. What has no such form is refused, with the pieces that would work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgevlm.decisions import Decision
from edgevlm.reduce.piece import Bottleneck, Choice, Merge, Piece, Rest, Scorer, known

if TYPE_CHECKING:
    from edgevlm.passes.base import Context
    from edgevlm.reduce.options import StageOptions
    from edgevlm.reduce.solve import Problem

__all__ = ["lacking_ops", "needs_dense", "refusal", "without_sorting"]

SORTING_OPS = ("TopK", "Gather")
CHOOSING_OPS = (*SORTING_OPS, "ArgMax")
"""Ops that tokens are chosen by, of which some processors lack one."""


def lacking_ops(context: Context) -> tuple[str, ...]:
    """The ops of choosing that the device does not run, whatever form is compiled for it."""
    return tuple(op for op in CHOOSING_OPS if context.targets and context.device.lacks(op))


def needs_dense(context: Context) -> bool:
    """Whether tokens are chosen without TopK and Gather."""
    return any(op in SORTING_OPS for op in lacking_ops(context))


def without_sorting(problem: Problem, context: Context) -> Iterator[Decision]:
    """That what sorts or looks up does so in another way, where anything does."""
    if not problem.dense:
        return
    choosing = [stage for stage in problem.stages if not (stage.transform or stage.bottleneck)]
    if any(not _missing(stage, context) for stage in choosing):
        lacking = [f"no {op}" for op in lacking_ops(context) if op in SORTING_OPS]
        yield Decision(
            asked="choice of tokens",
            outcome="degraded",
            reason=f"{' and '.join(lacking)} on {context.device.name}",
            effect="tokens are chosen by comparisons and one-hot products",
        )


def refusal(asked: str, stage: StageOptions, context: Context) -> Decision | None:
    """The refusal of a stage that the device cannot run in any form."""
    missing = _missing(stage, context)
    if not missing:
        return None
    piece, ops = missing[0]
    cut = "rows are taken between layers" if stage.skip is None else "rows skip layers"
    what = cut if piece is None else f"{piece.name!r} works"
    return Decision(
        asked=asked,
        outcome="refused",
        reason=f"{what} by {' and '.join(ops)}, which {context.device.name} does not run",
        effect=_instead(piece, stage, lacking_ops(context)),
    )


def _missing(stage: StageOptions, context: Context) -> list[tuple[Piece | None, list[str]]]:
    """The pieces that have no form without an op that is lacking, and the cut itself (None)."""
    lacking = lacking_ops(context)
    found: list[tuple[Piece | None, list[str]]] = []
    for piece in stage.pieces:
        ops = [op for op in lacking if op in _ops_of(type(piece))]
        if ops:
            found.append((piece, ops))
    if stage.at == "decoder" and "Gather" in lacking:
        found.append((None, ["Gather"]))
    return found


def _ops_of(kind: type[Piece]) -> tuple[str, ...]:
    """The ops of choosing that a piece has no form without."""
    return CHOOSING_OPS if kind.static_class == "S2" else kind.ops


def _instead(piece: Piece | None, stage: StageOptions, lacking: tuple[str, ...]) -> str:
    """What would work there, as a remedy."""
    if piece is None and stage.skip is not None:
        return "take tokens away at projector, or choose another device"
    if piece is None:
        return "put the stage at projector, or choose another device"
    families = (Scorer, Choice, Rest, Merge, Bottleneck)
    family = next(base for base in families if isinstance(piece, base))
    others = sorted(
        name
        for name, kind in known(family).items()
        if stage.at in kind.sites and not set(_ops_of(kind)) & set(lacking)
    )
    remedy = f"choose {' or '.join(others)}" if others else "choose another kind of stage"
    return ("leave rest out" if family is Rest else remedy) + ", or choose another device"
