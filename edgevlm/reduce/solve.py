"""From what a recipe asks to whole numbers: a budget solved over the stages, and every stage sized.

A budget is the average of visual tokens over the layers of the decoder, so that a method that cuts
late is compared with one that cuts early at the same cost. What a schedule cannot reach is refused
with the least that it can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgevlm.document import Complaint
from edgevlm.model.spec import VlmSpec
from edgevlm.reduce.fusion import FusionOptions
from edgevlm.reduce.options import StageOptions
from edgevlm.reduce.order import even_steps
from edgevlm.reduce.piece import SITES
from edgevlm.reduce.plan import Grid, Reduction, Stage, average_tokens
from edgevlm.reduce.positions import PositionOptions
from edgevlm.reduce.remembering import RememberOptions
from edgevlm.reduce.skipping import possible_layers, skip_stages

__all__ = ["Problem", "solve"]

STEPS = 60
IN_PATCHES = ("input", "encoder.layers", "encoder")
"""Where tokens are still patches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Stages to be sized for a model; `budget` is a share of its tokens, or a number of them.

    `positions` is a policy of where those stand that are left.
    """

    spec: VlmSpec
    stages: Sequence[StageOptions]
    budget: float | int | None
    method: str | None = None
    dense: bool = False
    pictures: int = 2
    positions: PositionOptions | None = None
    fusion: FusionOptions | None = None
    remember: RememberOptions | None = None


def solve(problem: Problem) -> Reduction:
    """Size every stage for every grid; Complaint with the remedy where that cannot be done."""
    _check_order(problem)
    return Reduction(
        stages=tuple((grid, _sized(problem, grid)) for grid in problem.spec.vision.grids),
        method=problem.method,
        dense=problem.dense,
        merge=problem.spec.projector.merge,
        pictures=problem.pictures,
        positions=problem.positions,
        fusion=problem.fusion,
        remember=problem.remember,
    )


def layer_of(stage: StageOptions, num_layers: int) -> int:
    """The decoder layer that a stage stands before: never the first, whose input is the prompt.

    Where tokens skip layers it is the first of these.
    """
    if stage.skip is not None:
        return possible_layers(stage, num_layers)[0]
    if stage.layer is not None:
        return stage.layer
    assert stage.depth is not None
    return max(1, round(stage.depth * num_layers))


def encoder_layers(stage: StageOptions, num_layers: int) -> tuple[int, ...]:
    """The layers of the encoder that a stage stands in, from 0, ascending."""
    for layer in stage.layers or ():
        if layer >= num_layers:
            raise Complaint(
                f"layer {layer} of an encoder of {num_layers}",
                hint=f"choose from 0 to {num_layers - 1}",
            )
    if stage.layers is not None:
        return stage.layers
    if stage.depths is None:
        return tuple(range(num_layers))
    # Shares that a shallow encoder has no layers for fall together.
    found = (max(0, round(depth * num_layers) - 1) for depth in stage.depths)
    return tuple(dict.fromkeys(found))


def _check_order(problem: Problem) -> None:
    """Stages stand in the order in which tokens pass them."""
    num_layers = len(problem.spec.decoder.layers)
    last = (-1, -1)
    in_layers = ("encoder.layers", "decoder")
    for index, stage in enumerate(problem.stages):
        layer = layer_of(stage, num_layers) if stage.at == "decoder" else -1
        if stage.at == "decoder" and not 1 <= layer < num_layers:
            raise Complaint(
                f"stage {index + 1} stands before layer {layer} of a decoder of {num_layers}",
                hint=f"choose a layer from 1 to {num_layers - 1}; before the first, use projector",
            )
        first, end = layer, layer
        if stage.at == "encoder.layers":
            layers = encoder_layers(stage, len(problem.spec.vision.layers))
            first, end = layers[0], layers[-1]
        here = (SITES.index(stage.at), first)
        if here <= last and (stage.at in in_layers or here < last):
            raise Complaint(
                f"stage {index + 1} at {stage.at} stands before the one that is written above it",
                hint="write stages in the order in which tokens pass them",
            )
        last = (SITES.index(stage.at), end)


def _sized(problem: Problem, grid: Grid) -> tuple[Stage, ...]:
    """The stages for one grid, with the budget solved."""
    asking = [stage for stage in problem.stages if stage.asks_budget]
    if not asking:
        if problem.budget is not None:
            raise Complaint(
                f"keep is {problem.budget}, and every stage says itself what it keeps",
                hint="remove keep, or write keep: budget in a stage",
            )
        return _stages(problem, grid, 1.0)
    if problem.budget is None and all(stage.is_published for stage in asking):
        return _stages(problem, grid, None)
    if problem.budget is None:
        raise Complaint(
            "stages keep a budget, and none is given", hint="write keep: 0.25 beside the method"
        )
    total = problem.spec.dense_tokens(grid)
    wanted = problem.budget if isinstance(problem.budget, int) else problem.budget * total
    if not 0 < wanted <= total:
        raise Complaint(
            f"cannot keep {problem.budget} of {total} visual tokens",
            hint=f"choose from 1 to {total}, or a share",
        )
    whole = _stages(problem, grid, 1.0)
    # Counts are whole, so an average can be met to within the tokens of one step.
    step = max(1.0, 0.02 * wanted)
    most = wanted + step
    largest = _average_of(problem, grid, whole)
    if largest < wanted - step:
        raise Complaint(
            f"an average of {wanted:.4g} of {total} tokens is out of reach: these stages leave at "
            f"most {largest:.4g}, {100 * largest / total:.1f} %",
            hint=f"ask for {math.floor(1000 * largest / total) / 1000:g} or less",
        )
    if wanted == total:
        return whole

    def cost(stages: tuple[Stage, ...]) -> tuple[bool, float]:
        average = _average_of(problem, grid, stages)
        return average > most, abs(average - wanted)

    low, high = 0.0, 1.0
    closest = whole
    refusal: Complaint | None = None
    for _ in range(STEPS):
        middle = (low + high) / 2
        try:
            found = _stages(problem, grid, middle)
        except Complaint as complaint:
            # Too few tokens for one of the pieces.
            low, refusal = middle, complaint
            continue
        closest = min(closest, found, key=cost)
        is_little = _average_of(problem, grid, found) < wanted
        low, high = (middle, high) if is_little else (low, middle)
    if closest is whole and refusal is not None:
        raise refusal
    why = "" if refusal is None else f" ({refusal.message})"
    least = _average_of(problem, grid, closest)
    if least > most:
        num_layers = len(problem.spec.decoder.layers)
        raise Complaint(
            f"an average of {wanted:.4g} of {total} tokens is out of reach: over {num_layers} "
            f"layers these stages leave at least {least:.4g}, {100 * least / total:.1f} %{why}",
            hint=f"ask for {math.ceil(1000 * least / total) / 1000:g} or more, or cut earlier",
        )
    return closest


def _average_of(problem: Problem, grid: Grid, stages: tuple[Stage, ...]) -> float:
    spec = problem.spec
    reduction = Reduction(stages=((grid, stages),), merge=spec.projector.merge)
    return average_tokens(reduction.segments(len(spec.decoder.layers), spec.dense_tokens(grid)))


def _stages(problem: Problem, grid: Grid, x: float | None) -> tuple[Stage, ...]:
    """Every stage sized, with the unknown of the budget set to x; None: as was published."""
    spec, merge = problem.spec, problem.spec.projector.merge
    total = count = spec.dense_tokens(grid)
    shape: Grid | None = spec.token_grid(grid)
    sized: list[Stage] = []
    for index, options in enumerate(problem.stages):
        if not sized and options.at in IN_PATCHES:
            # Before squares of patches are joined, tokens are patches.
            total = count = spec.patch_tokens(grid)
            is_whole = options.at == "input" or count == math.prod(grid)
            shape = grid if spec.vision.pixels == "image" and is_whole else None
        if sized and sized[-1].at in IN_PATCHES and options.at not in IN_PATCHES and merge > 1:
            assert shape is not None, "patches leave an encoder on a grid where they are joined"
            count, shape = count // merge**2, (shape[0] // merge, shape[1] // merge)
        try:
            if options.skip is not None:
                # All tokens are there again behind the layers that some skip.
                sized += _skip_stages(problem, index + 1, count, total, shape, x)
                continue
            keep = _count(options, count, total, x)
            found = _stage(problem, index + 1, count, keep, shape)
        except Complaint as complaint:
            raise Complaint(
                f"stage {index + 1}: {complaint.message}", hint=complaint.hint
            ) from None
        sized += found
        count, shape = found[-1].count_out, found[-1].grid_out
        if shape is not None and count != math.prod(shape):
            shape = None
    return tuple(sized)


def _count(options: StageOptions, count: int, total: int, x: float | None) -> int:
    """The tokens that leave a stage."""
    keep = options.keep
    if isinstance(keep, str):
        assert x is not None, "what asks for a budget is sized for one"
        power = int(keep.partition("^")[2] or 1)
        least = 0 if options.at == "decoder" and power > 1 else 1
        return max(least, min(count, round(total * x**power)))
    if isinstance(keep, float):
        return round(keep * count)
    return keep


def _skip_stages(
    problem: Problem, number: int, count: int, total: int, grid: Grid | None, x: float | None
) -> list[Stage]:
    """The stage, one for each layer that tokens skip."""
    options = problem.stages[number - 1]
    assert options.schedule is not None
    _check_grid(options, number, grid)
    return skip_stages(
        options,
        number=number,
        num_layers=len(problem.spec.decoder.layers),
        count=count,
        keep=None if options.schedule.says_share else _count(options, count, total, x),
        x=x,
        grid=grid,
        dense=problem.dense,
    )


def _check_grid(options: StageOptions, number: int, grid: Grid | None) -> None:
    """Raise Complaint where a piece takes a whole grid, and there is none."""
    for piece in options.pieces:
        if "grid" in piece.needs and grid is None:
            raise Complaint(
                f"{piece.name!r} takes a whole grid, and the tokens lie on none",
                hint="put it before stages that select or merge"
                if number > 1
                else "put the stage at projector",
            )


def _stage(problem: Problem, number: int, count: int, keep: int, grid: Grid | None) -> list[Stage]:
    """The stage, or one for each layer of the encoder it stands in."""
    options = problem.stages[number - 1]
    if keep > count:
        raise Complaint(
            f"cannot keep {keep} of the {count} tokens that come", hint=f"keep at most {count}"
        )
    if keep < 1 and options.at != "decoder":
        raise Complaint(
            f"it keeps none of the {count} tokens that come",
            hint="keep at least one; in the decoder a stage may keep none",
        )
    _check_grid(options, number, grid)
    if options.at == "encoder.layers":
        return _layer_stages(problem, number, count, keep, grid)
    layer = None
    if options.at == "decoder":
        layer = layer_of(options, len(problem.spec.decoder.layers))
    place = options.place or _place(problem, options)
    grid_out = grid if keep == count else None
    if options.bottleneck is not None:
        grid_out, longest = None, problem.spec.decoder.max_positions
        if count + keep >= longest:
            raise Complaint(
                f"{count} tokens and {keep} rows behind them take the {longest} positions that "
                "the model knows",
                hint="keep fewer, or put a stage before it that takes tokens away",
            )
    if options.transform is not None:
        assert grid is not None
        # The sides of what leaves must divide into the squares that a projector joins.
        side = problem.spec.projector.merge if options.at in IN_PATCHES else 1
        # A class token that is one of the visual tokens is none of a picture's patches.
        beside = count - math.prod(grid) if options.at == "input" else 0
        squares = options.transform.grid(
            (grid[0] // side, grid[1] // side), max(1, (keep - beside) // side**2)
        )
        grid_out = (squares[0] * side, squares[1] * side)
        keep = math.prod(grid_out) + beside
    check = getattr(options.select, "check", None)
    if check is not None and grid is not None:
        check(grid, keep)
    if options.merge is not None:
        if isinstance(options.keep, str):
            keep = options.merge.fit(count, keep)
        options.merge.check(count, keep)
    extra = 0 if options.rest is None or keep == count else options.rest.extra(keep, count)
    return [
        Stage(
            at=options.at,
            layer=layer,
            count_in=count,
            count_out=keep,
            grid_in=grid,
            grid_out=grid_out,
            place="keep" if options.bottleneck is not None else place,
            score=options.score,
            select=options.select,
            rest=options.rest,
            merge=options.merge,
            transform=options.transform,
            bottleneck=options.bottleneck,
            extra=extra,
            number=number,
            dense=problem.dense,
        )
    ]


def _place(problem: Problem, options: StageOptions) -> str:
    """Where tokens stand that a recipe says nothing about.

    Places on a grid mean something: where a model has three axes, tokens keep theirs, unless a
    policy says otherwise.
    """
    is_spread = bool(problem.spec.decoder.rope.sections) and problem.positions is None
    return "keep" if options.at == "decoder" or is_spread else "repack"


def _layer_stages(
    problem: Problem, number: int, count: int, keep: int, grid: Grid | None
) -> list[Stage]:
    """One stage for each layer: as many merges in every one, or the steps of a transform."""
    options = problem.stages[number - 1]
    layers = encoder_layers(options, len(problem.spec.vision.layers))
    grids: Sequence[Grid | None]
    if options.transform is not None:
        assert grid is not None
        steps = options.transform.steps(grid, keep)
        if len(steps) > len(layers):
            raise Complaint(
                f"{options.transform.name!r} leave {math.prod(steps[-1])} of {count} tokens after "
                f"{len(steps)} layers, and {len(layers)} are named",
                hint=f"name more layers, or keep {math.prod(steps[len(layers) - 1])} tokens",
            )
        layers = layers[-len(steps) :]
        counts, grids = [math.prod(step) for step in steps], steps
    else:
        counts, grids = even_steps(count, keep, len(layers)), [None] * len(layers)
    found: list[Stage] = []
    for layer, left, grid_out in zip(layers, counts, grids, strict=True):
        if options.merge is not None:
            options.merge.check(count, left)
        found.append(
            Stage(
                at=options.at,
                layer=layer,
                count_in=count,
                count_out=left,
                grid_in=grid,
                grid_out=grid_out,
                place=options.place or _place(problem, options),
                merge=options.merge,
                transform=options.transform,
                number=number,
                dense=problem.dense,
            )
        )
        count, grid = left, grid_out
    return found
