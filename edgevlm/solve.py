"""The solver: what a recipe asks and a device has, settled as typed decisions.

Everything that was asked for by name gets a decision, also when all of it is applied, so that a
report can say of each wish what became of it and why. Nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgevlm.decisions import Decision, Outcome
from edgevlm.device import Device
from edgevlm.document import suggest
from edgevlm.model.spec import VlmSpec
from edgevlm.recipe import Recipe
from edgevlm_export.forms import FORMS, Form

__all__ = ["Settled", "choose_targets", "round_up", "settle"]

# What a recipe's dtype may be; integer weights are what passes ask for.
FLOATS = frozenset({"float32", "float16", "bfloat16"})

# Rows of a conversation besides its pictures, where the recipe does not say how many it wants.
TEXT_ROWS = 512
PICTURES = 2
CAPACITY_STEP = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """What a compile does for a recipe on a device.

    `rows` are the row counts of static step graphs, by target.
    """

    dtype: str
    capacity: int
    rows: dict[str, tuple[int, ...]]
    decisions: tuple[Decision, ...]


def settle(
    recipe: Recipe,
    device: Device,
    spec: VlmSpec,
    picture_tokens: int,
    targets: tuple[str, ...],
) -> Settled:
    """Settle types and sizes; a refusal is a decision here, and an error in `refuse`."""
    dtype, dtype_decisions = _dtype(recipe, device, targets)
    capacity, capacity_decisions = _capacity(recipe, spec, picture_tokens)
    rows, row_decisions = _rows(targets, capacity)
    decisions = (
        *dtype_decisions,
        *capacity_decisions,
        *row_decisions,
        *_image_decisions(recipe, spec),
        *_note_decisions(spec),
        *_gate_decisions(recipe),
    )
    return Settled(dtype=dtype, capacity=capacity, rows=rows, decisions=decisions)


def choose_targets(recipe: Recipe, device: Device) -> tuple[tuple[str, ...], list[Decision]]:
    """The forms to compile, and what became of those that were asked for."""
    if recipe.targets is None:
        kept, decisions = _supported(device.targets, device)
        names = ", ".join(kept)
        return kept, [
            Decision(
                asked="targets (not named)",
                outcome="applied",
                reason=f"{device.name} runs {names}",
                effect=f"compiles {names}",
            ),
            *decisions,
        ]
    for index, name in enumerate(recipe.targets):
        if name not in FORMS:
            hint = suggest(name, list(FORMS))
            raise recipe.error(f"unknown target {name!r}", "targets", index, hint=hint)
        if name in recipe.targets[:index]:
            raise recipe.error(f"target {name!r} is named twice", "targets", index)
    return _supported(recipe.targets, device)


def _supported(names: Sequence[str], device: Device) -> tuple[tuple[str, ...], list[Decision]]:
    kept: list[str] = []
    decisions = []
    for name in names:
        decision = _target(name, FORMS[name], device)
        decisions.append(decision)
        if decision.outcome == "applied":
            kept.append(name)
    return tuple(kept), decisions


def _target(name: str, form: Form, device: Device) -> Decision:
    asked = f"target {name!r}"
    if name not in device.targets:
        return Decision(
            asked=asked,
            outcome="refused",
            reason=f"{device.name} runs {', '.join(device.targets)}",
            effect="choose one of these, or another device",
        )
    newest = device.compile.opset_max.value
    if form.opset > newest:
        return Decision(
            asked=asked,
            outcome="refused",
            reason=f"it needs opset {form.opset}, {device.name} loads opset {newest} at most",
            effect="choose another target or device",
        )
    if device.compile.static_only and not form.rows:
        return Decision(
            asked=asked,
            outcome="refused",
            reason=f"its graphs take any number of rows, {device.name} wants fixed shapes",
            effect="choose the target 'static', or another device",
        )
    shape = f"T in {', '.join(map(str, form.rows))}" if form.rows else "any number of rows"
    return Decision(
        asked=asked,
        outcome="applied",
        reason=f"{device.name} runs it",
        effect=f"a variant {name!r}: opset {form.opset}, {shape}",
    )


def _dtype(recipe: Recipe, device: Device, targets: Sequence[str]) -> tuple[str, list[Decision]]:
    """One type for weights and activations."""
    decisions = []
    for target in targets:
        facts = device.dtypes_of(target)
        has = [fact.weight for fact in facts if fact.weight == fact.activation in FLOATS]
        if recipe.dtype is not None and recipe.dtype not in has:
            decisions.append(
                Decision(
                    asked=f"dtype {recipe.dtype!r}",
                    outcome="refused",
                    reason=f"{device.name} computes in {', '.join(has)} on target {target!r}",
                    effect=f"set dtype to {' or '.join(has)}, or leave it out",
                )
            )
    usual = device.dtypes[0].weight
    if recipe.dtype is None:
        decisions.append(
            Decision(
                asked="dtype (not named)",
                outcome="applied",
                reason=f"{device.name} computes in {usual}",
                effect=f"weights and activations are {usual}",
            )
        )
    elif not decisions:
        decisions.append(
            Decision(
                asked=f"dtype {recipe.dtype!r}",
                outcome="applied",
                reason=f"{device.name} computes in it",
                effect=f"weights and activations are {recipe.dtype}",
            )
        )
    return recipe.dtype or usual, decisions


def _capacity(recipe: Recipe, spec: VlmSpec, picture_tokens: int) -> tuple[int, list[Decision]]:
    longest = spec.decoder.max_positions
    answer = recipe.generation.max_new_tokens or spec.generation.max_new_tokens
    capacity = recipe.context.capacity
    if capacity is None:
        wanted = round_up(PICTURES * picture_tokens + TEXT_ROWS + answer, CAPACITY_STEP)
        capacity, asked = min(wanted, longest), "context.capacity (not named)"
        reason = (
            f"{PICTURES} pictures of at most {picture_tokens} rows, {TEXT_ROWS} rows of text, "
            f"{answer} of answer; the model knows {longest} positions"
        )
    else:
        asked, reason = f"context.capacity {capacity}", f"the model knows {longest} positions"
    outcome: Outcome = "applied"
    effect = f"prompt and answer have {capacity} rows together"
    if capacity > longest:
        outcome, effect = "refused", f"set context.capacity to at most {longest}"
    elif capacity <= picture_tokens:
        outcome = "refused"
        reason = f"one picture takes up to {picture_tokens} rows of {capacity}"
        effect = f"set context.capacity to more than {picture_tokens}"
    elif capacity < picture_tokens + answer:
        outcome = "degraded"
        reason = f"one picture takes up to {picture_tokens} rows of {capacity}"
        effect = f"answers end before {answer} tokens, where the context is full"
    decision = Decision(asked=asked, outcome=outcome, reason=reason, effect=effect)
    return min(capacity, longest), [decision]


def _rows(
    targets: Sequence[str], capacity: int
) -> tuple[dict[str, tuple[int, ...]], list[Decision]]:
    rows = {}
    decisions = []
    for target in targets:
        wanted = FORMS[target].rows
        kept = tuple(count for count in wanted if count <= capacity)
        rows[target] = kept
        if kept != wanted:
            dropped = ", ".join(str(count) for count in wanted if count not in kept)
            decisions.append(
                Decision(
                    asked=f"step graphs of {', '.join(map(str, wanted))} rows on {target!r}",
                    outcome="degraded",
                    reason=f"a context of {capacity} rows has no room for {dropped}",
                    effect=f"long prompts are read {kept[-1]} rows at a time",
                )
            )
    return rows, decisions


def _image_decisions(recipe: Recipe, spec: VlmSpec) -> list[Decision]:
    """Wishes about pictures, which the family has carried out already."""
    decisions = []
    if recipe.image.split is not None:
        decisions.append(
            Decision(
                asked=f"image.split {str(recipe.image.split).lower()}",
                outcome="applied",
                reason=f"family {spec.family} cuts pictures into tiles",
                effect="a large picture becomes several tiles"
                if recipe.image.split
                else "every picture is one tile",
            )
        )
    if recipe.image.grids is not None:
        grids = ", ".join(f"{height} x {width}" for height, width in recipe.image.grids)
        decisions.append(
            Decision(
                asked=f"image.grids {grids}",
                outcome="applied",
                reason=f"family {spec.family} takes pictures of any shape",
                effect="a picture is resized to the nearest grid",
            )
        )
    return decisions


def _note_decisions(spec: VlmSpec) -> list[Decision]:
    """What the family leaves out of the checkpoint."""
    return [
        Decision(asked="checkpoint", outcome="degraded", reason=note, effect="left out")
        for note in spec.notes
    ]


def _gate_decisions(recipe: Recipe) -> list[Decision]:
    """Gates that the recipe loosens."""
    return [
        Decision(
            asked=f"evidence.gates.{name} {getattr(recipe.evidence.gates, name):g}",
            outcome="degraded",
            reason=reason,
            effect="evidence is held to this bound in place of the usual one",
        )
        for name, reason in recipe.evidence.loosened.items()
    ]


def round_up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step
