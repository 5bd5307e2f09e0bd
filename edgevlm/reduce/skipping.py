"""Stages whose tokens skip layers of the decoder, sized: one for every layer of a schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgevlm.document import Complaint
from edgevlm.reduce.options import StageOptions
from edgevlm.reduce.plan import Grid, Stage

__all__ = ["check_alone", "possible_layers", "skip_stages"]


def possible_layers(options: StageOptions, num_layers: int) -> tuple[int, ...]:
    """The layers that tokens may skip, ascending; for a budget, those of the least one."""
    assert options.schedule is not None, "checked when the stage was read"
    return tuple(options.schedule.shares(num_layers, 0.0))


def check_alone(stages: Sequence[StageOptions]) -> None:
    """Raise Complaint where tokens skip layers, and another stage stands in the decoder too."""
    deep = [number for number, stage in enumerate(stages, 1) if stage.at == "decoder"]
    skipping = [number for number in deep if stages[number - 1].skip is not None]
    if skipping and len(deep) > 1:
        (other, *_) = (number for number in deep if number != skipping[0])
        raise Complaint(
            f"stage {skipping[0]}: tokens that skip layers come back behind each of them, and "
            f"stage {other} takes or skips tokens of the decoder too",
            hint="leave one of them out, or take tokens away at projector",
        )


def skip_stages(
    options: StageOptions,
    *,
    number: int,
    num_layers: int,
    count: int,
    keep: int | None,
    x: float | None,
    grid: Grid | None,
    dense: bool,
) -> list[Stage]:
    """The stage in every layer, of which `count` tokens come to each.

    `keep` of them pass where the schedule does not say itself how many.
    """
    assert options.schedule is not None
    found = []
    for layer, share in options.schedule.shares(num_layers, x).items():
        if share is None:
            assert keep is not None, "a stage keeps what its schedule does not say"
            passing = keep
        else:
            # Published: rounded down.
            passing = max(1, math.trunc(share * count))
        if passing > count:
            raise Complaint(
                f"cannot keep {passing} of the {count} tokens that come",
                hint=f"keep at most {count}",
            )
        if passing < 1:
            raise Complaint(
                f"none of the {count} tokens that come pass layer {layer}",
                hint="keep at least one",
            )
        check = getattr(options.select, "check", None)
        if check is not None and grid is not None:
            check(grid, passing)
        found.append(
            Stage(
                at=options.at,
                layer=layer,
                count_in=count,
                count_out=passing,
                grid_in=grid,
                grid_out=grid,
                place="keep",
                score=options.score,
                select=options.select,
                skip=options.skip,
                number=number,
                dense=dense,
            )
        )
    return found
