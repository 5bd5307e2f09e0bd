"""What a bottleneck needs of a model and of the stages beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgevlm.document import Complaint

if TYPE_CHECKING:
    from edgevlm.reduce.solve import Problem

__all__ = ["check_bottleneck"]


def check_bottleneck(problem: Problem) -> None:
    """Raise Complaint where rows cannot stand for a picture in this model or beside these stages.

    What is hidden is one number of rows for every picture, that no state knows of, and whose
    positions count by one.
    """
    spec, stages, policy = problem.spec, problem.stages, problem.positions
    numbers = [number for number, stage in enumerate(stages, 1) if stage.bottleneck is not None]
    if not numbers:
        return
    number, stage = numbers[0], stages[numbers[0] - 1]
    assert stage.bottleneck is not None
    who = f"stage {number}: {stage.bottleneck.name!r}"
    if number < len(stages):
        later = stages[number]
        raise Complaint(
            f"{who} stand for the picture in every layer of the decoder, and stage {number + 1} at "
            f"{later.at} stands behind them",
            hint="remove it, or take tokens away before them",
        )
    for index, layer in enumerate(spec.decoder.layers):
        if layer.mixer != "attention":
            raise Complaint(
                f"{who} hide rows from those behind, and decoder.layers.{index} is "
                f"{layer.mixer!r}, whose state stands for all rows",
                hint="choose a method that takes tokens away before the decoder",
            )
        if layer.attention.window is not None:
            raise Complaint(
                f"{who} hide rows from those behind, and decoder.layers.{index} sees a window of "
                f"{layer.attention.window} rows, which would count them or not",
                hint="choose a method that takes tokens away before the decoder",
            )
    if spec.decoder.rope.sections:
        raise Complaint(
            f"{who} count on from the picture along one axis, and visual tokens of this model "
            "stand on three",
            hint="choose a method that takes tokens away before the decoder",
        )
    if len(spec.vision.grids) > 1:
        raise Complaint(
            f"{who} hide one number of tokens, and pictures come in {len(spec.vision.grids)} grids",
            hint="name one grid in image.grids",
        )
    if problem.fusion is not None:
        raise Complaint(
            f"{who} are all that text sees of the picture, and fused text has seen the whole of it",
            hint="remove fusion",
        )
    if policy is not None:
        raise Complaint(
            f"{who} count on from the picture, and {policy.name} places it otherwise",
            hint="remove positions",
        )
    if any(earlier.place == "keep" for earlier in stages[: number - 1]):
        raise Complaint(
            f"{who} count on from the picture, and a stage before them leaves gaps between "
            "positions",
            hint="remove place: keep",
        )
