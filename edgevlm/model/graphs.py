"""The graphs that a model becomes, as modules: flat tensors in, flat tensors out.

Each module's inputs and outputs are those of its plan (`edgevlm.model.plans`), in that order, so
that capture and evidence run the same thing. Sites are the module paths of the model, which hangs
in the wrapper by its parts: `vision`, `projector`, `decoder`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgevlm.model.attention import AttentionCore, DeltaCache, InplaceCache
from edgevlm.model.plans import (
    delta_plan,
    inplace_plan,
    num_logit_rows,
    step_name,
    vision_plan,
)
from edgevlm.model.rope import rope_tables
from edgevlm.model.vision import GridTables, grid_tables
from edgevlm.model.vlm import Decoder, Vlm
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

    def __init__(self, model: Vlm, grid: tuple[int, int]) -> None:
        """Share the model's parts, and hold the tables of the grid as constants."""
        super().__init__()
        self.vision = model.vision
        self.projector = model.projector
        self.grid = grid
        tables = grid_tables(model.spec.vision, grid)
        self.windows = None if tables is None else tables.windows
        for name in ("order", "inverse", "cos", "sin"):
            value = None if tables is None else getattr(tables, name)
            self.register_buffer(name, value, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [N, ...] to image_embeds [N, tokens, W]."""
        tables = None
        if self.windows is not None:
            buffers = {name: self.get_buffer(name) for name in ("order", "inverse", "cos", "sin")}
            tables = GridTables(windows=self.windows, **buffers)
        rows: Tensor = self.projector(self.vision(pixels, tables), self.grid)
        return rows


class InplaceStep(nn.Module):
    """A decoder over a cache that it extends."""

    def __init__(self, decoder: Decoder, *, prompt: bool = False) -> None:
        """Share the decoder; `prompt` says that calls are pieces of prompts alone."""
        super().__init__()
        self.decoder = decoder
        self.prompt = prompt

    def forward(
        self,
        inputs_embeds: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        logit_rows: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """Map this call's rows to logits of the rows wanted, and the extended cache."""
        lengths = seqlens_k, total_sequence_length
        caches = [
            InplaceCache(key, value, *lengths, rope_cos, rope_sin, prompt=self.prompt)
            for key, value in zip(past[::2], past[1::2], strict=True)
        ]
        logits = self.decoder(inputs_embeds, caches, logit_rows)
        return (logits, *(part for cache in caches for part in (cache.key, cache.value)))


class DeltaStep(nn.Module):
    """A decoder over a cache that the host extends."""

    def __init__(self, decoder: Decoder) -> None:
        """Share the decoder."""
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        inputs_embeds: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        attn_mask: Tensor,
        logit_rows: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """Map this call's rows to logits of the rows wanted, and their keys and values."""
        caches = [
            DeltaCache(key, value, attn_mask, rope_cos, rope_sin)
            for key, value in zip(past[::2], past[1::2], strict=True)
        ]
        logits = self.decoder(inputs_embeds, caches, logit_rows)
        return (logits, *(part for cache in caches for part in (cache.key, cache.value)))


def vision_graph(
    model: Vlm, grid: tuple[int, int] | None = None, num_images: int | None = None
) -> ModelGraph:
    """The vision graph of a grid, of the only one where none is named."""
    grid = model.spec.vision.grids[0] if grid is None else grid
    plan = vision_plan(model.spec, grid, num_images)
    # Two pictures where the number is free: torch.export takes a 1 for a constant.
    shape = [2 if isinstance(size, str) else size for size in plan.inputs[0].shape]
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return ModelGraph(module=VisionGraph(model, grid).eval(), plan=plan, examples=(pixels,))


def inplace_step(model: Vlm, capacity: int, phases: Collection[str] = ()) -> ModelGraph:
    """The step graph that extends its cache, any number of rows a call.

    One that serves the phase `prefill` alone has the weights for prompts, where there are such.
    """
    plan = inplace_plan(model.spec, capacity, step_name(phases))
    rows, used = 5, 2
    embeds, cos, sin, past = _step_examples(model, plan, rows, used)
    pad = (0, 0, 0, capacity - rows)
    examples = (
        embeds,
        nn.functional.pad(cos, pad),
        nn.functional.pad(sin, pad),
        torch.tensor([used + rows - 1], dtype=torch.int32),
        torch.tensor(used + rows, dtype=torch.int32),
        torch.tensor([rows - 2, rows - 1]),
        *past,
    )
    module = InplaceStep(_decoder_of(model, phases), prompt=set(phases) == {"prefill"})
    return ModelGraph(module=module.eval(), plan=plan, examples=examples)


def delta_step(
    model: Vlm, capacity: int, num_rows: int, phases: Collection[str] = ()
) -> ModelGraph:
    """The step graph of a fixed number of rows, whose cache the host extends."""
    plan = delta_plan(model.spec, capacity, num_rows)
    used = min(2, capacity)
    embeds, cos, sin, past = _step_examples(model, plan, num_rows, used)
    mask = torch.full((num_rows, capacity + num_rows), CLOSED)
    mask[:, :used] = 0.0
    mask[:, capacity:] = causal_mask(num_rows, num_rows, closed=CLOSED)
    wanted = torch.arange(num_rows)[-num_logit_rows(num_rows) :]
    examples = (embeds, cos, sin, mask[None, None], wanted, *past)
    module = DeltaStep(_decoder_of(model, phases))
    return ModelGraph(module=module.eval(), plan=plan, examples=examples)


def _decoder_of(model: Vlm, phases: Collection[str]) -> Decoder:
    alone = model.prefill is not None and set(phases) == {"prefill"}
    return model.prefill if alone and model.prefill is not None else model.decoder


def _step_examples(
    model: Vlm, plan: GraphPlan, rows: int, used: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Seeded rows, their rotary tables, and a cache with `used` slots filled."""
    generator = torch.Generator().manual_seed(0)
    rope = model.spec.decoder.rope
    embeds = torch.randn(1, rows, model.spec.decoder.width, generator=generator)
    cos, sin = rope_tables(rope, torch.arange(used, used + rows))
    past = []
    state = (tensor for tensor in plan.inputs if tensor.source.startswith("state:"))
    cores = [part for part in model.decoder.modules() if isinstance(part, AttentionCore)]
    scales = [(core, scale) for core in cores for scale in (core.k_scale, core.v_scale)]
    for tensor, (core, scale) in zip(state, scales, strict=True):
        sizes = [int(size) for size in tensor.shape[:3]]
        buffer = torch.zeros(*sizes, core.spec.head_dim)
        buffer[:, :, :used] = torch.randn(buffer[:, :, :used].shape, generator=generator)
        past.append(core.stored(buffer, scale))
    return embeds, cos, sin, past
