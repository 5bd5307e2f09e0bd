"""What a recipe says of reduction: stages, each with a site, a number of tokens and one verb."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from edgevlm.document import Complaint, Options, show
from edgevlm.reduce.piece import (
    Bottleneck,
    Choice,
    Merge,
    Rest,
    Schedule,
    Scorer,
    Site,
    Skip,
    Transform,
)
from edgevlm.reduce.pieces import (
    BottleneckField,
    ChoiceField,
    MergeField,
    RestField,
    ScheduleField,
    ScorerField,
    SkipField,
    TransformField,
)

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
    AnySkip = Skip
    AnySchedule = Schedule
    AnyBottleneck = Bottleneck
else:
    AnyScorer = ScorerField
    AnyChoice = ChoiceField
    AnyRest = RestField
    AnyMerge = MergeField
    AnyTransform = TransformField
    AnySkip = SkipField
    AnySchedule = ScheduleField
    AnyBottleneck = BottleneckField

VERBS = ("select", "merge", "transform", "bottleneck")


class StageOptions(Options):
    """One stage: where it stands, how many tokens leave it, and how they are found."""

    at: Site = Field(description="Where it stands.")
    keep: Keep = Field(
        "budget",
        description="Tokens of a picture that leave it: a number, a share of those that come, or "
        "'budget' ('budget^2' for a second stage), which is solved for the average over layers. Of "
        "a bottleneck: the rows that stay in the cache.",
    )
    layer: int | None = Field(None, ge=0, description="Of the decoder: the layer it stands before.")
    depth: float | None = Field(
        None, gt=0, lt=1, description="The same as a share of the decoder's layers."
    )
    schedule: AnySchedule | None = Field(
        None, description="Of the decoder, where tokens skip: the layers that they may skip."
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        min_length=1,
        description="Of the encoder: the layers it stands in, from 0; absent: all of them.",
    )
    depths: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        None,
        min_length=1,
        description="The same as shares of the encoder's layers, behind which it stands.",
    )
    score: AnyScorer | None = Field(None, description="How much each token matters.")
    select: AnyChoice | None = Field(None, description="Which tokens are kept.")
    rest: AnyRest | None = Field(None, description="What the others become; absent: nothing.")
    skip: AnySkip | None = Field(
        None,
        description="The others are not dropped, but skip the layers of the schedule: what becomes "
        "of them, and of those that pass.",
    )
    merge: AnyMerge | None = Field(None, description="Which tokens become one.")
    transform: AnyTransform | None = Field(None, description="A constant map of the grid.")
    bottleneck: AnyBottleneck | None = Field(
        None, description="Rows by which alone what follows a picture sees it."
    )
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
        for key in ("score", "rest", "skip"):
            if data.get(key) is not None and verbs != ["select"]:
                raise Complaint(f"{key} goes with select", hint=f"remove {key}", key=key)
        if data.get("schedule") is not None and data.get("skip") is None:
            raise Complaint(
                "schedule is for tokens that skip layers, and here they are dropped",
                hint="add skip: reweighted, or write layer: 8",
                key="schedule",
            )
        return data

    @model_validator(mode="after")
    def _stands_somewhere(self) -> StageOptions:
        is_deep = self.at == "decoder"
        self._check_skip()
        given = [key for key in ("layer", "depth") if getattr(self, key) is not None]
        if is_deep and self.skip is None and len(given) != 1:
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
        self._check_encoder_layers()
        self._check_scores()
        if self.bottleneck is not None and self.place == "repack":
            raise Complaint(
                f"text behind {self.bottleneck.name!r} stands where it does behind the whole "
                "picture, and nothing is counted anew",
                hint="remove place",
                key="place",
            )
        for piece in self.pieces:
            if self.at not in piece.sites:
                raise Complaint(
                    f"{piece.name!r} cannot stand at {self.at}",
                    hint=f"choose {' or '.join(piece.sites)}",
                    key="at",
                )
        return self

    def _check_skip(self) -> None:
        """Tokens that skip layers come back to their places, and are scored by what can weigh."""
        if self.skip is None or self.at != "decoder":
            return
        name, schedule = self.skip.name, self.schedule
        for key in ("layer", "depth"):
            if getattr(self, key) is not None:
                raise Complaint(
                    f"tokens skip the layers of a schedule, and {key} is where they are dropped",
                    hint=f"remove {key}",
                    key=key,
                )
        if schedule is None:
            raise Complaint(
                f"{name!r} lets tokens skip layers, and no schedule says which",
                hint="add schedule: {every: {step: 2}}, or schedule: cosine",
                key="skip",
            )
        if schedule.says_share and self.keep != "budget":
            raise Complaint(
                f"{schedule.name!r} says itself how many tokens pass a layer",
                hint="remove keep, or write schedule: {every: {step: 2}}",
                key="keep",
            )
        if self.score is None or self.score.name not in self.skip.scorers:
            given = "the stage has none" if self.score is None else f"got {self.score.name!r}"
            raise Complaint(
                f"{name!r} weighs tokens by the scores of a router, and {given}",
                hint=f"score by {' or '.join(self.skip.scorers)}",
                key="skip" if self.score is None else "score",
            )
        for key, value in (("rest", self.rest), ("place", self.place == "repack" or None)):
            if value is not None:
                raise Complaint(
                    f"tokens that skip a layer come back to their places behind it, and {key} is "
                    "for those that are dropped",
                    hint=f"remove {key}",
                    key=key,
                )
        for piece in self.pieces:
            if piece.looks_back or piece.looks_here or piece.looks_normed:
                raise Complaint(
                    f"{piece.name!r} looks at more than tokens and their scores, and other tokens "
                    "pass each layer",
                    hint="write select: top",
                    key="select",
                )

    def _check_encoder_layers(self) -> None:
        """Layers of the encoder are for stages in it, which read them in order."""
        given = [key for key in ("layers", "depths") if getattr(self, key) is not None]
        if given and self.at != "encoder.layers":
            raise Complaint(
                f"{given[0]} is for stages at encoder.layers, not for {self.at}",
                hint=f"remove {given[0]}",
                key=given[0],
            )
        if len(given) == 2:
            raise Complaint(
                "a stage at encoder.layers names one of layers and depths", hint="remove depths"
            )
        if self.at == "encoder.layers" and self.transform is not None and not given:
            raise Complaint(
                f"{self.transform.name!r} names the layers it stands behind",
                hint="write layers: [5, 11], or depths: [0.25, 0.5]",
            )
        for key in given:
            for before, behind in pairwise(getattr(self, key)):
                if behind <= before:
                    raise Complaint(
                        f"{key} ascend, and {show(behind)} stands behind {show(before)}",
                        hint="write each of them once, in order",
                        key=key,
                    )

    def _check_scores(self) -> None:
        """What goes by scores has a scorer, of a kind it can work with."""
        if self.score is None:
            for piece in (self.select, self.rest):
                if piece is not None and piece.by_score:
                    raise Complaint(
                        f"{piece.name!r} goes by scores, and the stage has none",
                        hint="add score: encoder_attention, or another one",
                    )
            return
        wanted = () if self.rest is None else self.rest.scorers
        if self.rest is not None and wanted and self.score.name not in wanted:
            raise Complaint(
                f"{self.rest.name!r} weighs tokens by their scores, and those of "
                f"{self.score.name!r} are no shares",
                hint=f"score by {' or '.join(wanted)}",
                key="score",
            )

    @property
    def pieces(self) -> tuple[Any, ...]:
        """Its pieces."""
        found = (
            *(self.score, self.select, self.rest, self.skip, self.merge, self.transform),
            self.bottleneck,
        )
        return tuple(piece for piece in found if piece is not None)

    @property
    def asks_budget(self) -> bool:
        """Whether what it keeps is solved for a budget, where there is one."""
        is_said = self.schedule is not None and self.schedule.says_share and self.schedule.is_fixed
        return isinstance(self.keep, str) and not is_said

    @property
    def is_published(self) -> bool:
        """Whether it knows what to keep where there is no budget."""
        return self.schedule is not None and self.schedule.says_share

    @property
    def needs(self) -> frozenset[str]:
        """What its pieces look at besides the tokens."""
        return frozenset[str]().union(*(piece.needs for piece in self.pieces))
