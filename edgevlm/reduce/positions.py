"""Where visual tokens stand in the decoder: the policies, and what follows from them.

    v2pe   tokens count on by a fraction, so that a picture takes less of the context (V2PE, arXiv
           2412.09616): text after it stands at the last one's position, rounded up, and one
    share  the tokens of a row of the grid, or all of a picture, share one position (MouSi, arXiv
           2401.17221)
    ppe    a merged token has the places of several of the tokens that it was merged from, each for
           a block of the rotary frequencies (PPE, Positional Preservation Embedding)

Without one tokens count on by one; or stand where they stood, where a stage keeps that (`place`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from edgevlm.document import Complaint, Options
from edgevlm.reduce.lattice import centres
from edgevlm_runtime.structure import to_json

if TYPE_CHECKING:
    from edgevlm.model.spec import VlmSpec
    from edgevlm.reduce.plan import Grid

__all__ = ["PositionOptions", "Ppe", "V2pe", "blocks", "coordinates", "offsets", "span"]

POLICIES = ("v2pe", "share", "ppe")


class V2pe(Options):
    """Tokens count on by a fraction."""

    step: float = Field(gt=0, le=1, description="How far each token stands from the one before.")


class Ppe(Options):
    """Tokens have several places."""

    axes: int = Field(ge=1, le=64, description="Places of a token, and blocks of frequencies.")


class PositionOptions(Options):
    """One policy."""

    v2pe: V2pe | None = Field(None, description="Tokens count on by a fraction (V2PE).")
    share: Literal["row", "all"] | None = Field(
        None, description="Tokens of a row of the grid, or of a picture, share one (MouSi)."
    )
    ppe: Ppe | None = Field(
        None, description="A merged token has the places of several of its members (PPE)."
    )

    @model_validator(mode="before")
    @classmethod
    def _has_one_policy(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        given = [name for name in POLICIES if data.get(name) is not None]
        if len(given) != 1:
            raise Complaint(
                f"positions have one of {', '.join(POLICIES)}, got {' and '.join(given) or 'none'}",
                hint="write v2pe: {step: 0.25}, share: row, or ppe: {axes: 8}",
            )
        return data

    @property
    def name(self) -> str:
        """The policy's name."""
        return next(name for name in POLICIES if getattr(self, name) is not None)

    @property
    def num_places(self) -> int:
        """Places of a token."""
        return 1 if self.ppe is None else self.ppe.axes


def blocks(sections: tuple[int, ...], num_frequencies: int, axes: int) -> tuple[int, ...]:
    """Sections of frequencies, each split for the places of a token; Complaint where one cannot."""
    whole = sections or (num_frequencies,)
    common = math.gcd(*whole)
    if common % axes:
        fitting = [str(number) for number in range(1, common + 1) if common % number == 0]
        raise Complaint(
            f"{' and '.join(map(str, whole))} rotary frequencies are not {axes} blocks of one size",
            hint=f"choose axes from {', '.join(fitting)}",
        )
    return tuple(size // axes for size in whole for _ in range(axes))


def coordinates(spec: VlmSpec, grid: Grid, place: int) -> tuple[int, ...]:
    """Where a token of a whole picture stands behind its beginning: a number for each axis."""
    if spec.rule_axes == 1:
        return (place,)
    shape = spec.token_grid(grid)
    assert shape is not None, "three axes are those of a grid"
    return 0, place // shape[1], place % shape[1]


def offsets(spec: VlmSpec, grid: Grid) -> tuple[tuple[float, ...], ...] | None:
    """Where the tokens of every picture of a grid stand behind its beginning, a row for each.

    None where they stand as the rule of the text section says, or as the graph does.
    """
    if spec.moves_positions(grid) or spec.reduction is None:
        return None
    policy, num_tokens = spec.reduction.positions, spec.image_tokens(grid)
    if policy is not None and policy.share is not None:
        across = _shape(spec, grid)[1] if policy.share == "row" else num_tokens
        down = 0 if spec.rule_axes == 1 else 1
        rows = [[0.0] * spec.rule_axes for _ in range(num_tokens)]
        for place, row in enumerate(rows):
            row[down] = float(place // across)
        return tuple(map(tuple, rows))
    kept = spec.keeps_places(grid)
    places = _places(spec, grid) if kept else range(num_tokens)
    if policy is not None and policy.v2pe is not None:
        return tuple(((place + 1) * policy.v2pe.step - 1,) for place in places)
    if kept:
        return tuple(tuple(map(float, coordinates(spec, grid, place))) for place in places)
    return None


def span(spec: VlmSpec, grid: Grid) -> float | None:
    """How far a picture of a grid moves the position on; None where the rule says it."""
    reduction = spec.reduction
    if reduction is None:
        return None
    policy, num_tokens, shape = reduction.positions, spec.image_tokens(grid), spec.token_grid(grid)
    kept, whole = spec.keeps_places(grid), spec.dense_tokens(grid)
    if policy is not None and policy.v2pe is not None:
        return float(math.ceil((whole if kept else num_tokens) * policy.v2pe.step))
    if policy is not None and policy.share is not None:
        return float(_shape(spec, grid)[0]) if policy.share == "row" else 1.0
    if kept or spec.moves_positions(grid):
        # As far as it did whole.
        return float(whole if spec.rule_axes == 1 or shape is None else max(shape))
    if spec.rule_axes == 1:
        return None
    # Tokens counted anew stand as text does, unless they are still all of a grid.
    assert shape is not None, "three axes are those of a grid"
    return float(max(shape) if num_tokens == whole else num_tokens)


def _shape(spec: VlmSpec, grid: Grid) -> Grid:
    """The grid on which the tokens lie that enter the decoder; Complaint where they lie on none."""
    assert spec.reduction is not None
    before = spec.reduction.before(grid)
    shape = before[-1].grid_out if before else spec.token_grid(grid)
    if shape is None:
        raise Complaint(
            "tokens share the positions of rows, and lie on no grid",
            hint="write share: all, or reduce with a transform",
        )
    return shape


def _places(spec: VlmSpec, grid: Grid) -> list[int]:
    """The tokens of the whole picture that those stand for which transforms leave."""
    assert spec.reduction is not None
    places = list(range(spec.dense_tokens(grid)))
    for stage in spec.reduction.before(grid):
        if stage.at != "input":
            assert stage.grid_in is not None
            assert stage.grid_out is not None
            side = 1 if stage.at == "projector" else spec.projector.merge
            old, new = (
                (height // side, width // side) for height, width in (stage.grid_in, stage.grid_out)
            )
            places = [places[place] for place in centres(old, new)]
    return places


def image_section(spec: VlmSpec) -> dict[str, Any]:
    """The manifest's image section: how many tokens a picture has now, and where they stand."""
    grids = spec.vision.grids
    section = {**spec.image, "tokens": [spec.image_tokens(grid) for grid in grids]}
    for key, found in (
        ("offsets", [offsets(spec, grid) for grid in grids]),
        ("spans", [span(spec, grid) for grid in grids]),
    ):
        if any(entry is not None for entry in found):
            assert None not in found, "the stages are of one kind for all grids"
            section[key] = to_json(found)
    return section
