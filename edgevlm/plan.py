"""A plan: the graphs, shapes, tokens, state, memory and decisions that a recipe leads to.

It is made from the configuration alone, without weights and without torch, and it is what the
compiler carries out: `edgevlm plan` shows the same object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from edgevlm.checkpoint import open_checkpoint
from edgevlm.decisions import Decision
from edgevlm.device import Device, load_device
from edgevlm.document import suggest
from edgevlm.families.image_spec import ImageChoices
from edgevlm.model.plans import (
    PICTURE,
    delta_plan,
    inplace_plan,
    picture_room,
    reads_prompts,
    step_name,
    step_states,
    vision_plan,
)
from edgevlm.model.spec import VlmSpec
from edgevlm.passes.base import Context
from edgevlm.quant.sites import linear_sites
from edgevlm.recipe import Recipe
from edgevlm.resources import device_files
from edgevlm.sizes import (
    Parameters,
    decoder_activations,
    learned_bytes,
    parameters,
    shares_table,
    table_bytes,
    vision_activations,
    weight_bytes,
)
from edgevlm.solve import Settled, choose_targets, round_up, settle
from edgevlm.tokens import TokenPlan, dropped_rows, largest_picture, token_plan
from edgevlm_export.forms import FORMS
from edgevlm_export.plan import GraphPlan
from edgevlm_runtime.manifest import StateGroup

__all__ = [
    "MemoryPlan",
    "Plan",
    "PlannedGraph",
    "VariantPlan",
    "make_plan",
    "recipe_device",
    "recipe_plan",
]

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}
ALL_PHASES = ("prefill", "decode", "verify")
DECODE_ROWS = 8
ENCODER = ("vision", "projector")
# A generation can be cancelled between two chunks of its prompt, so a chunk is bounded.
PREFILL_ROWS = 512
# A prompt with pictures comes in one call where some are taken away on the way: this much text.
PICTURE_TEXT_ROWS = 96
ROW_STEP = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedGraph:
    """One graph to capture: its job, its form, and what goes in and out of it.

    `form` is `vision`, `inplace` or `delta`; `rows` is the number of rows of a static step,
    `max_rows` the most that a dynamic one takes; `grid` is the patch grid of a vision graph, and
    `num_images` how many pictures it takes, or its prompts have, None for any number. `dropped`
    says for a state group
    how many rows of each picture never reach it.
    """

    role: str
    form: str
    signature: GraphPlan
    phases: tuple[str, ...] = ()
    mask: str = "causal"
    rows: int | None = None
    max_rows: int | None = None
    grid: tuple[int, int] | None = None
    num_images: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The graph's name in the bundle."""
        return self.signature.name


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes that a session of a variant needs, each an upper bound.

    `weights` are the graphs' files, mapped; `packed` the private copies that the engine makes of
    them, one per graph; `embedding` is the table, mapped; `activations` are those of the widest
    layer of the largest call.
    """

    weights: int
    packed: int
    embedding: int
    state: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, as if every page were resident."""
        return self.weights + self.packed + self.embedding + self.state + self.activations


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantPlan:
    """One compiled form of the model."""

    target: str
    graphs: tuple[PlannedGraph, ...]
    state: tuple[StateGroup, ...]
    memory: MemoryPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a compile of a recipe makes; `spec` is the model's after all passes."""

    recipe: Recipe
    device: Device
    spec: VlmSpec
    dtype: str
    parameters: Parameters
    tokens: TokenPlan
    variants: tuple[VariantPlan, ...]
    decisions: tuple[Decision, ...]


def recipe_plan(recipe: Recipe, text_rows: int | None = None) -> Plan:
    """Open the recipe's device and checkpoint, and plan."""
    device = recipe_device(recipe)
    checkpoint = open_checkpoint(recipe.source, recipe.revision)
    return make_plan(recipe, device, checkpoint.spec(image_choices(recipe)), text_rows)


def recipe_device(recipe: Recipe) -> Device:
    """The device that the recipe names."""
    known = list(device_files())
    if recipe.device not in known:
        hint = suggest(recipe.device, known)
        raise recipe.error(f"unknown device {recipe.device!r}", "device", hint=hint)
    return load_device(recipe.device)


def image_choices(recipe: Recipe) -> ImageChoices:
    """What the recipe says of pictures, as families take it."""
    return ImageChoices(split=recipe.image.split, grids=recipe.image.grids)


def make_plan(recipe: Recipe, device: Device, spec: VlmSpec, text_rows: int | None = None) -> Plan:
    """Plan a model of which only the spec is known.

    Costs are told for a prompt of one picture and `text_rows` rows of text, of as many as the
    recipe says where None.
    """
    targets, target_decisions = choose_targets(recipe, device)
    context = Context(device=device, targets=targets, seed=recipe.seed, folder=recipe.path.parent)
    decisions = [_model_decision(recipe, spec), *target_decisions]
    whole = spec
    for step in recipe.passes:
        whole = spec if spec.reduction is None else whole
        foresight = step.foresee(spec, context)
        spec = foresight.spec
        decisions.append(
            Decision(
                asked=f"pass {step.name}",
                outcome="applied",
                reason="named in the recipe",
                effect=foresight.effect,
            )
        )
        decisions += foresight.decisions
    settled = settle(recipe, device, spec, largest_picture(spec), targets)
    variants = tuple(_variant(target, spec, settled) for target in targets)
    return Plan(
        recipe=recipe,
        device=device,
        spec=spec,
        dtype=settled.dtype,
        parameters=parameters(spec),
        tokens=token_plan(
            spec,
            whole,
            capacity=settled.capacity,
            max_new_tokens=recipe.generation.max_new_tokens or spec.generation.max_new_tokens,
            text_rows=recipe.context.text_rows if text_rows is None else text_rows,
        ),
        variants=variants,
        decisions=(
            *decisions,
            *settled.decisions,
            *_picture_decisions(spec, settled.capacity, targets),
            *(_memory_decision(variant, device) for variant in variants),
        ),
    )


def _variant(target: str, spec: VlmSpec, settled: Settled) -> VariantPlan:
    capacity, form = settled.capacity, FORMS[target]
    num_images = 1 if form.rows else None
    vision = [
        PlannedGraph(
            role="vision",
            form="vision",
            grid=grid,
            num_images=num_images,
            signature=vision_plan(spec, grid, num_images),
        )
        for grid in spec.vision.grids
    ]
    state = step_states(spec, capacity, form.state)
    if form.state == "inplace":
        steps = _inplace_steps(spec, capacity)
    else:
        steps = _delta_steps(spec, capacity, settled.rows[target])
    return VariantPlan(
        target=target,
        graphs=(*vision, *steps),
        state=state,
        memory=_memory(spec, settled, state, len(vision), steps),
    )


def _inplace_steps(spec: VlmSpec, capacity: int) -> list[PlannedGraph]:
    """The step graphs that extend their caches, by the phases they serve."""
    served = (("prefill",), ("decode", "verify")) if spec.has_prefill else (ALL_PHASES,)
    steps = [
        PlannedGraph(
            role="step",
            form="inplace",
            phases=phases,
            max_rows=min(capacity, PREFILL_ROWS),
            signature=inplace_plan(spec, capacity, step_name(phases)),
        )
        for phases in served
    ]
    dropped = dropped_rows(spec)
    if dropped or spec.remembered_width:
        steps.append(
            PlannedGraph(
                role="step",
                form="inplace",
                phases=(PICTURE,),
                max_rows=picture_room(spec, capacity),
                signature=inplace_plan(spec, capacity, step_name((PICTURE,)), pictures=True),
                dropped=dropped,
            )
        )
    return steps


def _delta_steps(spec: VlmSpec, capacity: int, counts: Sequence[int]) -> list[PlannedGraph]:
    """The step graphs of fixed numbers of rows."""
    steps = [
        PlannedGraph(
            role="step",
            form="delta",
            phases=("decode", "verify") if rows <= DECODE_ROWS else ("prefill",),
            mask="additive",
            rows=rows,
            signature=delta_plan(spec, capacity, rows),
        )
        for rows in counts
    ]
    dropped = dropped_rows(spec)
    if dropped or spec.remembered_width:
        for pictures in range(1, _num_pictures(spec, capacity) + 1):
            wanted = pictures * spec.entering + PICTURE_TEXT_ROWS
            rows = min(picture_room(spec, capacity, pictures), round_up(wanted, ROW_STEP))
            steps.append(
                PlannedGraph(
                    role="step",
                    form="delta",
                    phases=(PICTURE,),
                    mask="additive",
                    rows=rows,
                    num_images=pictures,
                    signature=delta_plan(spec, capacity, rows, pictures=pictures),
                    dropped=dropped,
                )
            )
    return steps


def _num_pictures(spec: VlmSpec, capacity: int) -> int:
    """The most pictures of a prompt of fixed shape: as many as the context holds with some text."""
    assert spec.reduction is not None
    return min(spec.reduction.pictures, (capacity - 1) // spec.segments[0].tokens)


def _picture_decisions(spec: VlmSpec, capacity: int, targets: Sequence[str]) -> Iterator[Decision]:
    """Where prompts of fixed shape have fewer pictures than was asked for."""
    takes_whole = dropped_rows(spec) or spec.remembered_width
    if not takes_whole or not any(FORMS[target].rows for target in targets):
        return
    assert spec.reduction is not None
    asked, fitting = spec.reduction.pictures, _num_pictures(spec, capacity)
    if fitting < asked:
        tokens = spec.segments[0].tokens
        yield Decision(
            asked=f"prompts of up to {asked} pictures in fixed shapes",
            outcome="degraded",
            reason=f"a context of {capacity} rows has no room for {asked} of {tokens} tokens",
            effect=f"a prompt has at most {fitting}",
        )


def _memory(
    spec: VlmSpec,
    settled: Settled,
    state: Sequence[StateGroup],
    num_visions: int,
    steps: list[PlannedGraph],
) -> MemoryPlan:
    size = BYTES[settled.dtype]
    encoder = weight_bytes(spec, "vision", "projector") + _other_bytes(spec, "encoder")
    head, norms = weight_bytes(spec, "decoder.head"), _other_bytes(spec, "decoder")
    roots = ("decoder.layers", "prefill.layers") if spec.has_prefill else ("decoder.layers",)
    layers = {root: weight_bytes(spec, root) for root in roots}
    packed = sum(
        layers.get("prefill.layers" if _is_prompt(step) else "", layers["decoder.layers"])
        for step in steps
    )
    rows = max(step.rows or step.max_rows or 1 for step in steps)
    shared, learned = shares_table(spec, steps[0].form), learned_bytes(spec)
    return MemoryPlan(
        weights=encoder + sum(layers.values()) + norms + learned + (0 if shared else head),
        packed=encoder * num_visions + packed + learned + (norms + head) * len(steps),
        embedding=table_bytes(spec),
        state=sum(group.nbytes for group in state),
        activations=size
        * max(
            decoder_activations(spec, rows, settled.capacity),
            *(vision_activations(spec, grid) for grid in spec.vision.grids),
        ),
    )


def _is_prompt(step: PlannedGraph) -> bool:
    """Whether a step graph serves prompts alone."""
    return reads_prompts(step.phases)


def _other_bytes(spec: VlmSpec, part: str) -> int:
    """Bytes of a part that are no linear map: norms, biases, patches, positions."""
    count = parameters(spec)
    numbers = count.layers if part == "decoder" else count.vision + count.projector
    for site in linear_sites(spec).values():
        if site.component == "decoder" if part == "decoder" else site.component in ENCODER:
            numbers -= site.numbers
    return 4 * numbers


def _model_decision(recipe: Recipe, spec: VlmSpec) -> Decision:
    total = parameters(spec).total
    return Decision(
        asked=f"model {recipe.model}",
        outcome="applied",
        reason=f"family {spec.family} reads it",
        effect=f"{total / 1e6:,.1f} M parameters",
    )


def _memory_decision(variant: VariantPlan, device: Device) -> Decision:
    needs, has = variant.memory.total / 2**20, device.memory.capacity.base / 2**20
    asked = f"memory of variant {variant.target!r}"
    if needs > has:
        return Decision(
            asked=asked,
            outcome="refused",
            reason=f"it needs up to {needs:,.0f} MiB, {device.name} has {has:,.0f} MiB",
            effect="lower context.capacity, or choose a smaller model",
        )
    return Decision(
        asked=asked,
        outcome="applied",
        reason=f"{device.name} has {has:,.0f} MiB",
        effect=f"up to {needs:,.0f} MiB",
    )
