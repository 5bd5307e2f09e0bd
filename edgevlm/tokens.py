"""The visual tokens of a plan: how many every layer sees, and what a prompt costs by that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgevlm.model.spec import VlmSpec
from edgevlm.reduce.cost import Cost, Prompt, prompt_cost, visual_tokens
from edgevlm.reduce.plan import Grid, state_segments
from edgevlm_runtime.images.spec import ImageSpec, TiledGeometry

__all__ = ["SegmentPlan", "TokenPlan", "dropped_rows", "largest_picture", "token_plan"]

TEXT_ROWS = 64
"""Rows of text beside the picture whose cost is told, where nobody says how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentPlan:
    """Decoder layers from `first` to `end` - 1, which see the same rows.

    `tokens` are the rows of one picture (or tile), `rows` those of the whole prompt. `kept` of the
    tokens stay in the state: all, unless a bottleneck hides the others.
    `positions` are `kept` where tokens stand where they stood, `packed` where they were counted
    anew. The layers keep their state in the group `group`, which has `capacity` slots.
    """

    first: int
    end: int
    tokens: int
    kept: int
    rows: int
    positions: str
    group: str
    capacity: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPlan:
    """Visual tokens, what a prompt with a picture costs, and what is left of the context for text.

    `per_call` has the tokens of one call of each vision graph; `largest_picture` is the most that
    one picture takes of the context, all its tiles and the tokens around them counted.

    Costs are those of `priced`: the picture of the most tokens, with `text_rows` rows of text
    besides. `layers` are the visual tokens of one picture (or tile) at each layer of the decoder;
    `dense` is the same prompt without reduction, None where there is none.
    """

    per_call: Mapping[Grid, int]
    largest_picture: int
    capacity: int
    max_new_tokens: int
    priced: Prompt
    text_rows: int
    layers: tuple[int, ...]
    dense_tokens: int
    segments: tuple[SegmentPlan, ...]
    cost: Cost
    dense: Cost | None

    @property
    def prompt(self) -> int:
        """Rows for the prompt besides one picture of the largest kind and a whole answer."""
        return max(0, self.capacity - self.largest_picture - self.max_new_tokens)

    @property
    def average(self) -> float:
        """Visual tokens of a picture (or tile), averaged over the layers of the decoder."""
        return sum(self.layers) / len(self.layers)

    @property
    def percent(self) -> dict[str, float] | None:
        """What is left of the whole, in percent; None where nothing is taken away."""
        if self.dense is None:
            return None
        ours, whole = self.cost, self.dense
        return {
            "average_tokens": 100 * self.average / self.dense_tokens,
            "vision": 100 * ours.vision / whole.vision,
            "projector": 100 * ours.projector / whole.projector,
            "prefill": 100 * ours.prefill / whole.prefill,
            "total": 100 * ours.total / whole.total,
            "kv": 100 * ours.kv_bytes / whole.kv_bytes,
        }


def token_plan(
    spec: VlmSpec,
    whole: VlmSpec,
    *,
    capacity: int,
    max_new_tokens: int,
    text_rows: int | None,
) -> TokenPlan:
    """The tokens of a model, and the cost of a prompt of one picture and so many rows of text.

    `whole` is the model before its reduction, whose pictures may have been larger.
    """
    text_rows = TEXT_ROWS if text_rows is None else text_rows
    prompt, grid = _prompt(spec, text_rows), _prompt(whole, text_rows).grid
    layers = visual_tokens(spec, prompt.grid)
    # What later passes made of its cache is no matter of reduction.
    whole = replace(whole, decoder=spec.decoder)
    return TokenPlan(
        per_call={grid: spec.image_tokens(grid) for grid in spec.vision.grids},
        largest_picture=largest_picture(spec),
        capacity=capacity,
        max_new_tokens=max_new_tokens,
        priced=prompt,
        text_rows=text_rows,
        layers=layers,
        dense_tokens=whole.dense_tokens(grid),
        segments=_segments(spec, prompt, layers, capacity),
        cost=prompt_cost(spec, prompt),
        dense=None if spec.reduction is None else prompt_cost(whole, _prompt(whole, text_rows)),
    )


def _prompt(spec: VlmSpec, text_rows: int) -> Prompt:
    """A prompt with the picture of the most tokens."""
    groups, marks = picture_groups(spec)
    grid = max(spec.vision.grids, key=spec.dense_tokens)
    return Prompt(grid=grid, text_rows=marks + text_rows, groups=groups)


def _segments(
    spec: VlmSpec, prompt: Prompt, layers: tuple[int, ...], capacity: int
) -> tuple[SegmentPlan, ...]:
    """The segments with the room that `step_states` gives them."""
    most = spec.segments[0].tokens
    packed = _is_packed(spec, prompt.grid)
    return tuple(
        SegmentPlan(
            first=segment.first,
            end=segment.end,
            tokens=layers[segment.first],
            kept=layers[segment.first] - spec.hidden,
            rows=prompt.groups * layers[segment.first] + prompt.text_rows,
            positions="packed" if packed or segment.is_packed else "kept",
            group=segment.group,
            capacity=capacity - (most - segment.tokens),
        )
        for segment in spec.segments
    )


def _is_packed(spec: VlmSpec, grid: Grid) -> bool:
    """Whether the tokens that enter the decoder are counted anew."""
    if spec.reduction is None:
        return False
    before = [stage for stage in spec.reduction.before(grid) if stage.bottleneck is None]
    return bool(before) and before[-1].place != "keep"


def dropped_rows(spec: VlmSpec) -> dict[str, int]:
    """Rows of a picture that never reach a state group; empty where all layers keep all."""
    found = state_segments(spec.segments)
    deep = found if spec.hidden else found[1:]
    return {segment.group: spec.entering - segment.tokens for segment in deep}


def largest_picture(spec: VlmSpec) -> int:
    """Rows of the decoder that the largest picture becomes, as far as they take slots."""
    groups, marks = picture_groups(spec)
    most = max(spec.image_tokens(grid) for grid in spec.vision.grids)
    return groups * (most - spec.hidden) + marks


def picture_groups(spec: VlmSpec) -> tuple[int, int]:
    """Calls of the vision graph that the largest picture takes, and rows of marks around them."""
    geometry = ImageSpec.from_json(spec.image).geometry
    if not isinstance(geometry, TiledGeometry) or not geometry.split:
        return 1, 0
    side = -(-geometry.longest_edge // geometry.tile)
    # Every tile stands between marks of its own, the whole picture at the end.
    groups = side * side + 1
    return groups, 2 * groups + side + 2
