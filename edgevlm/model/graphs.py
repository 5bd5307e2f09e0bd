"""The graphs that a model becomes, as modules: flat tensors in, flat tensors out.

Each module's inputs and outputs are those of its plan (`edgevlm.model.plans`), in that order, so
that capture and evidence run the same thing. Sites are the module paths of the model, which hangs
in the wrapper by its parts: `vision`, `projector`, `decoder`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgevlm.model.attention import Angles, AttentionCore, DeltaCache, InplaceCache
from edgevlm.model.bottleneck import Hidden, hidden_of
from edgevlm.model.decoder import Decoder
from edgevlm.model.plans import (
    FINE,
    PICTURE,
    delta_plan,
    inplace_plan,
    picture_room,
    reads_prompts,
    step_name,
    vision_plan,
)
from edgevlm.model.rope import rope_tables
from edgevlm.model.spec import VlmSpec
from edgevlm.model.stages import Asking, Pictures, project, token_offsets
from edgevlm.model.vision import GridTables, grid_tables
from edgevlm.model.vlm import Vlm
from edgevlm.reduce.plan import MAIN, Segment
from edgevlm_export.ops import CLOSED, causal_mask
from edgevlm_export.plan import GraphPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelGraph:
    """A module to capture, what goes in and out of it, and inputs it runs with."""

    module: nn.Module
    plan: GraphPlan
    examples: tuple[Tensor, ...]


class VisionGraph(nn.Module):
    """Pixels of one grid to rows of the decoder."""

    def __init__(self, model: Vlm, plan: GraphPlan, grid: tuple[int, int]) -> None:
        """Share the model's parts, and hold the tables of the grid as constants."""
        super().__init__()
        self.vision = model.vision
        self.projector = model.projector
        self.reduce = model.reduce
        self.fusion = model.fusion
        self.spec, self.grid = model.spec, grid
        self.kinds = [
            tensor.source.partition(":")[2]
            for tensor in plan.inputs
            if tensor.source.startswith("question_weights:")
        ]
        tables = grid_tables(model.spec.vision, grid)
        self.windows = None if tables is None else tables.windows
        for name in ("order", "inverse", "cos", "sin"):
            value = None if tables is None else getattr(tables, name)
            self.register_buffer(name, value, persistent=False)

    def forward(self, pixels: Tensor, *question: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Map pixels [N, ...] to image_embeds [N, tokens, W].

        With them come positions where these move, the text [N, Q, W] where it is fused, and the
        features of all patches where tokens look at them again.
        """
        tables = None
        if self.windows is not None:
            buffers = {name: self.get_buffer(name) for name in ("order", "inverse", "cos", "sin")}
            tables = GridTables(windows=self.windows, **buffers)
        asking = None
        if question:
            weights = dict(zip(self.kinds, question[1:], strict=True))
            asking = Asking(rows=question[0], weights=weights)
        seen = self.vision(pixels, tables, self.grid)
        tokens = project(
            self.spec, self.projector, self.reduce, seen, self.grid, asking, self.fusion
        )
        outputs = [tokens.features]
        if self.spec.moves_positions(self.grid):
            outputs.append(token_offsets(self.spec, self.grid, tokens))
        if tokens.text is not None:
            outputs.append(tokens.text)
        if tokens.fine is not None:
            outputs.append(tokens.fine[:, None])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class InplaceStep(nn.Module):
    """A decoder over caches that it extends; its inputs are those of its plan, in that order."""

    def __init__(self, model: Vlm, decoder: Decoder, plan: GraphPlan, *, prompt: bool) -> None:
        """Share the decoder; `prompt` says that calls are pieces of prompts alone."""
        super().__init__()
        self.decoder = decoder
        self.spec, self.plan, self.prompt = model.spec, plan, prompt

    def forward(self, inputs_embeds: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Map this call's rows to logits of the rows wanted, and the extended caches."""
        given = _by_source(self.plan, inputs_embeds, rest)
        pictures, hidden = _pictures(given), _hidden(self.spec, given)
        caches = []
        for segment in self.spec.segments:
            angles = _angles(given, segment, pictures, is_padded=True)
            lengths = given[f"last_slot:{segment.group}"], given[f"total:{segment.group}"]
            for index in range(segment.first, segment.end):
                cache = given[f"state:key.{index}"], given[f"state:value.{index}"]
                caches.append(
                    InplaceCache(*cache, *lengths, angles, prompt=self.prompt, hidden=hidden)
                )
        logits = self.decoder(inputs_embeds, caches, given["logit_rows"], pictures)
        return (logits, *(part for cache in caches for part in (cache.key, cache.value)))


class DeltaStep(nn.Module):
    """A decoder over caches that the host extends; its inputs are those of its plan."""

    def __init__(self, model: Vlm, decoder: Decoder, plan: GraphPlan) -> None:
        """Share the decoder."""
        super().__init__()
        self.decoder = decoder
        self.spec, self.plan = model.spec, plan

    def forward(self, inputs_embeds: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Map this call's rows to logits of the rows wanted, and their keys and values."""
        given = _by_source(self.plan, inputs_embeds, rest)
        pictures, hidden = _pictures(given), _hidden(self.spec, given)
        caches = []
        for segment in self.spec.segments:
            angles = _angles(given, segment, pictures, is_padded=False)
            mask = given[f"mask:{segment.group}"]
            if hidden is not None:
                # The host's has the rows that stay, all of which see the same slots.
                mask = hidden.mask(mask[:, :, :1, : -mask.shape[2]])
            for index in range(segment.first, segment.end):
                cache = given[f"state:key.{index}"], given[f"state:value.{index}"]
                caches.append(DeltaCache(*cache, mask, angles, hidden))
        logits = self.decoder(inputs_embeds, caches, given["logit_rows"], pictures)
        return (logits, *(part for cache in caches for part in (cache.key, cache.value)))


def _by_source(plan: GraphPlan, first: Tensor, rest: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The inputs of a step by their sources."""
    sources = [tensor.source for tensor in plan.inputs]
    return dict(zip(sources, (first, *rest), strict=True))


def _pictures(given: Mapping[str, Tensor]) -> Pictures | None:
    """Where visual tokens stand, in graphs that take some away on the way."""
    if "last_row" not in given:
        return None
    weights = {
        source.partition(":")[2]: tensor
        for source, tensor in given.items()
        if source.startswith("row_weights:")
    }
    starts, fine = given["picture_rows"], given.get(f"output:{FINE}")
    fine = None if fine is None else fine[0]
    return Pictures(starts=starts, last=given["last_row"], weights=weights, fine=fine)


def _hidden(spec: VlmSpec, given: Mapping[str, Tensor]) -> Hidden | None:
    """What a bottleneck hides, in graphs that are told where pictures stand."""
    if "picture_rows" not in given or not spec.hidden:
        return None
    return hidden_of(spec, given["picture_rows"], given["embeds"])


def _angles(
    given: Mapping[str, Tensor], segment: Segment, pictures: Pictures | None, *, is_padded: bool
) -> Angles:
    """The rotary tables of a segment: its own, or those of the rows that a cut leaves."""
    end = f":{segment.group}" if f"rope_cos:{segment.group}" in given else ""
    tables = given[f"rope_cos{end}"], given[f"rope_sin{end}"]
    is_own = pictures is None or segment.group == MAIN or bool(end)
    return Angles(*tables, is_own=is_own, is_padded=is_padded)


def vision_graph(
    model: Vlm, grid: tuple[int, int] | None = None, num_images: int | None = None
) -> ModelGraph:
    """The vision graph of a grid, of the only one where none is named."""
    grid = model.spec.vision.grids[0] if grid is None else grid
    plan = vision_plan(model.spec, grid, num_images)
    generator = torch.Generator().manual_seed(0)
    # Two pictures where the number is free: torch.export takes a 1 for a constant.
    sizes = {"N": 2, "Q": 5}
    examples = []
    for tensor in plan.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        example = torch.randn(shape, generator=generator)
        examples.append(example.abs() if "weights" in tensor.source else example)
    module = VisionGraph(model, plan, grid).eval()
    return ModelGraph(module=module, plan=plan, examples=tuple(examples))


def inplace_step(model: Vlm, capacity: int, phases: Collection[str] = ()) -> ModelGraph:
    """The step graph that extends its cache, any number of rows a call.

    One that serves the phase `prefill` alone has the weights for prompts, where there are such; so
    has one for `picture` alone, which takes visual tokens away on the way.
    """
    is_picture = set(phases) == {PICTURE}
    plan = inplace_plan(model.spec, capacity, step_name(phases), pictures=is_picture)
    decoder, prompt = _decoder_of(model, phases), reads_prompts(phases)
    module = InplaceStep(model, decoder, plan, prompt=prompt).eval()
    num_rows = model.spec.entering + 5 if is_picture else 5
    used = 0 if is_picture else 2
    rows = picture_room(model.spec, capacity) if is_picture else capacity
    examples = _step_examples(model, plan, num_rows, used, rows)
    return ModelGraph(module=module, plan=plan, examples=examples)


def delta_step(
    model: Vlm,
    capacity: int,
    num_rows: int,
    phases: Collection[str] = (),
    pictures: int | None = None,
) -> ModelGraph:
    """The step graph of a fixed number of rows, whose cache the host extends.

    With `pictures` the rows are a whole prompt with that many picture groups.
    """
    plan = delta_plan(model.spec, capacity, num_rows, pictures=pictures)
    module = DeltaStep(model, _decoder_of(model, phases), plan).eval()
    used = 0 if pictures else min(2, capacity)
    examples = _step_examples(model, plan, num_rows, used, num_rows)
    return ModelGraph(module=module, plan=plan, examples=examples)


def _decoder_of(model: Vlm, phases: Collection[str]) -> Decoder:
    alone = model.prefill is not None and reads_prompts(phases)
    return model.prefill if alone and model.prefill is not None else model.decoder


def _step_examples(
    model: Vlm, plan: GraphPlan, num_rows: int, used: int, table_rows: int
) -> tuple[Tensor, ...]:
    """Seeded rows of a call, with everything that goes with them, by the sources of the inputs."""
    generator = torch.Generator().manual_seed(0)
    spec = model.spec
    cos, sin = rope_tables(spec.decoder.rope, torch.arange(used, used + num_rows))
    pad = (0, 0, 0, table_rows - num_rows)
    tables = {"rope_cos": nn.functional.pad(cos, pad), "rope_sin": nn.functional.pad(sin, pad)}
    tokens, num_pictures = spec.entering, 0
    for tensor in plan.inputs:
        if tensor.source == "picture_rows":
            num_pictures = 1 if isinstance(tensor.shape[0], str) else tensor.shape[0]
    cores = [part for part in model.decoder.modules() if isinstance(part, AttentionCore)]
    found = []
    for tensor in plan.inputs:
        kind, _, name = tensor.source.partition(":")
        rows = num_rows
        if num_pictures and kind in ("last_slot", "total", "mask"):
            segment = next(part for part in spec.segments if part.group == name)
            rows -= num_pictures * (tokens - segment.tokens)
        if kind == "embeds":
            example = torch.randn(1, num_rows, spec.decoder.width, generator=generator)
        elif kind in tables:
            example = tables[kind]
        elif kind == "last_slot":
            example = torch.tensor([used + rows - 1], dtype=torch.int32)
        elif kind == "total":
            example = torch.tensor(used + rows, dtype=torch.int32)
        elif kind == "mask":
            example = _mask(rows, used, int(tensor.shape[3]) - rows)
        elif kind == "logit_rows":
            count = 2 if isinstance(tensor.shape[0], str) else tensor.shape[0]
            example = torch.arange(num_rows)[-count:]
        elif kind == "picture_rows":
            count = 1 if isinstance(tensor.shape[0], str) else tensor.shape[0]
            example = 1 + tokens * torch.arange(count)
        elif kind == "last_row":
            example = torch.tensor([num_rows - 1])
        elif kind == "output":
            patches = math.prod(spec.vision.grids[0])
            shape = 1, num_pictures, patches, spec.remembered_width
            example = torch.randn(shape, generator=generator)
        elif kind == "row_weights":
            example = (torch.arange(num_rows) > num_pictures * tokens).float()[None]
        else:
            part, _, index = name.partition(".")
            core = cores[int(index)]
            sizes = [int(size) for size in tensor.shape[:3]]
            buffer = torch.zeros(*sizes, core.spec.head_dim)
            filled = buffer[:, :, :used]
            buffer[:, :, :used] = torch.randn(filled.shape, generator=generator)
            example = core.stored(buffer, core.k_scale if part == "key" else core.v_scale)
        found.append(example)
    return tuple(found)


def _mask(rows: int, used: int, slots: int) -> Tensor:
    """The additive mask [1, 1, T, S + T] of rows after some used slots."""
    mask = torch.full((rows, slots + rows), CLOSED)
    mask[:, :used] = 0.0
    mask[:, slots:] = causal_mask(rows, rows, closed=CLOSED)
    return mask[None, None]
