"""What a recipe says of reduction: stages, each with a site, a number of tokens and one verb."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from edgevlm.document import Complaint, Options, show
from edgevlm.reduce.piece import Choice, Merge, Rest, Scorer, Site, Transform
from edgevlm.reduce.pieces import ChoiceField, MergeField, RestField, ScorerField, TransformField

__all__ = ["Keep", "StageOptions"]

_BUDGET = re.compile(r"budget(\^[1-9])?")
KEEP = "a number of tokens, a share such as 0.25, or 'budget'"


def _keep(value: object) -> int | float | str:
    """A number, a share, or what the method's budget is solved for."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise Complaint(f"keep must be {KEEP}, got {show(value)}")
    if isinstance(value, str) and not _BUDGET.fullmatch(value):
        raise Complaint(f"keep must be {KEEP}, got {show(value)}", hint="write 'budget'")
    if isinstance(value, float) and not 0 <= value <= 1:
        raise Complaint(
            f"a share of tokens must be between 0 and 1, got {show(value)}",
            hint="write a whole number of tokens without a point",
        )
    if isinstance(value, int) and value < 0:
        raise Complaint(f"keep must be {KEEP}, got {show(value)}")
    return value


Keep = Annotated[
    int | float | str,
    PlainValidator(_keep),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": f"^{_BUDGET.pattern}$"},
            ]
        }
    ),
]

if TYPE_CHECKING:
    AnyScorer = Scorer
    AnyChoice = Choice
    AnyRest = Rest
    AnyMerge = Merge
    AnyTransform = Transform
else:
    AnyScorer = ScorerField
    AnyChoice = ChoiceField
    AnyRest = RestField
    AnyMerge = MergeField
    AnyTransform = TransformField

VERBS = ("select", "merge", "transform")


class StageOptions(Options):
    """One stage: where it stands, how many tokens leave it, and how they are found."""

    at: Site = Field(description="Where it stands.")
    keep: Keep = Field(
        "budget",
        description="Tokens of a picture that leave it: a number, a share of those that come, or "
        "'budget' ('budget^2' for a second stage), which is solved for the average over layers.",
    )
    layer: int | None = Field(None, ge=0, description="Of the decoder: the layer it stands before.")
    depth: float | None = Field(
        None, gt=0, lt=1, description="The same as a share of the decoder's layers."
    )
    score: AnyScorer | None = Field(None, description="How much each token matters.")
    select: AnyChoice | None = Field(None, description="Which tokens are kept.")
    rest: AnyRest | None = Field(None, description="What the others become; absent: nothing.")
    merge: AnyMerge | None = Field(None, description="Which tokens become one.")
    transform: AnyTransform | None = Field(None, description="A constant map of the grid.")
    place: Literal["keep", "repack"] | None = Field(
        None,
        description="Positions in the decoder: those the tokens had, or counted anew; absent: "
        "kept within the decoder, counted anew before it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _has_one_verb(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        verbs = [verb for verb in VERBS if data.get(verb) is not None]
        if len(verbs) != 1:
            raise Complaint(
                f"a stage has one of {', '.join(VERBS)}, got {' and '.join(verbs) or 'none'}",
                hint="write one stage for each" if verbs else "add select: uniform, or another",
            )
        for key, wanted in (("score", "select"), ("rest", "select")):
            if data.get(key) is not None and verbs != [wanted]:
                raise Complaint(f"{key} goes with {wanted}", hint=f"remove {key}", key=key)
        return data

    @model_validator(mode="after")
    def _stands_somewhere(self) -> StageOptions:
        is_deep = self.at == "decoder"
        given = [key for key in ("layer", "depth") if getattr(self, key) is not None]
        if is_deep and len(given) != 1:
            raise Complaint(
                "a stage of the decoder names one of layer and depth",
                hint="write layer: 8, or depth: 0.25",
            )
        if not is_deep and given:
            raise Complaint(
                f"{given[0]} is for stages of the decoder, not for {self.at}",
                hint=f"remove {given[0]}",
                key=given[0],
            )
        for piece in self.pieces:
            if self.at not in piece.sites:
                raise Complaint(
                    f"{piece.name!r} cannot stand at {self.at}",
                    hint=f"choose {' or '.join(piece.sites)}",
                    key="at",
                )
        return self

    @property
    def pieces(self) -> tuple[Any, ...]:
        """Its pieces."""
        found = (self.score, self.select, self.rest, self.merge, self.transform)
        return tuple(piece for piece in found if piece is not None)

    @property
    def needs(self) -> frozenset[str]:
        """What its pieces look at besides the tokens."""
        return frozenset[str]().union(*(piece.needs for piece in self.pieces))
