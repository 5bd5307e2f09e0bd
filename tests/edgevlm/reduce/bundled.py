"""Bundles of small models with stages within the decoder: step graphs alone, for both forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgevlm.graphs import EMBEDDING, WEIGHTS, graph_file, manifest_variant, module_of
from edgevlm.model.vlm import Vlm
from edgevlm.plan import Plan, PlannedGraph, VariantPlan, make_plan, recipe_device
from edgevlm.recipe import parse_recipe
from edgevlm.reduce.plan import Segment
from edgevlm_export.capture import capture
from edgevlm_export.lower import lower
from edgevlm_export.targets import TARGETS
from edgevlm_export.write import WeightFile, write
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode.decoder import StepDecoder, open_decoder
from edgevlm_runtime.decode.protocol import Prompt
from edgevlm_runtime.engine import Engines
from edgevlm_runtime.engines.table import open_table
from tests.edgevlm.reduce.deep import Asked, deep_spec, model_of, staged
from tests.runtime.bundles import write_manifest

CAPACITY = 224
TARGET_NAMES = ("ort", "static")
GRAPHS = ("picture", "picture_1_160", "picture_2_192", "step", "step_1", "step_8")
_RECIPE = parse_recipe(
    "model: a/b\ndevice: host-cpu\ntargets: [ort, static]\n"
    f"context: {{capacity: {CAPACITY}}}\npasses: []\n"
)


class Bundled:
    """A model with stages, and its bundle."""

    def __init__(
        self,
        folder: Path,
        num_layers: int,
        stages: Sequence[Mapping[str, Any]],
        keep: float | None,
        model: Vlm | None = None,
    ) -> None:
        """Write all step graphs of both forms, of a model that is there where one is given."""
        self.model = model or model_of(staged(deep_spec(num_layers), *stages, keep=keep))
        plan = make_plan(_RECIPE, recipe_device(_RECIPE), self.model.spec)
        self.plan = dataclasses.replace(
            plan,
            variants=tuple(
                dataclasses.replace(
                    variant, graphs=tuple(graph for graph in variant.graphs if graph.name in GRAPHS)
                )
                for variant in plan.variants
            ),
        )
        folder.mkdir()
        with WeightFile(folder / WEIGHTS) as weights:
            table = self.model.embedding.get_parameter("weight").detach().numpy()
            weights.write_table(table, folder / EMBEDDING)
            for variant, planned, captured in captures(self.model, self.plan):
                lowered = lower(captured, TARGETS[variant.target])
                write(lowered, folder / graph_file(variant, planned), weights)
        variants = {
            variant.target: manifest_variant(self.plan, variant) for variant in self.plan.variants
        }
        write_manifest(folder, variants)
        self.folder = folder

    def decoder(self, target: str) -> StepDecoder:
        """A decoder over the graphs of a form."""
        bundle = Bundle.open(self.folder, target)
        table = open_table(bundle, bundle.variant.graphs[0])
        return open_decoder(bundle, Engines(bundle), table)


def captures(model: Vlm, plan: Plan) -> Iterator[tuple[VariantPlan, PlannedGraph, ir.Model]]:
    """Every graph; those that see no pictures depend on what runs of layers there are alone.

    Where tokens skip layers, or rows of a picture are hidden, they are captured like others.
    """
    for variant in plan.variants:
        for planned in variant.graphs:
            is_alike = not model.decoder.skips and not model.spec.hidden
            if planned.name.startswith("step") and is_alike:
                steps = captured_steps(model.spec.segments)
                yield variant, planned, steps[variant.target, planned.name]
            else:
                made = module_of(model, variant, planned)
                yield variant, planned, capture(made.module, made.plan)


@cache
def captured_steps(segments: tuple[Segment, ...]) -> dict[tuple[str, str], ir.Model]:
    """The graphs for tokens, by target and name: models of equal depth have equal weights."""
    stages = [
        {
            "at": "decoder",
            "layer": segment.first,
            "keep": segment.tokens,
            "score": "random",
            "select": "top",
            "place": "repack" if segment.is_packed else "keep",
        }
        for segment in segments[1:]
    ]
    model = model_of(staged(deep_spec(segments[-1].end), *stages))
    assert model.spec.segments == segments
    plan = make_plan(_RECIPE, recipe_device(_RECIPE), model.spec)
    found = {}
    for variant in plan.variants:
        for planned in variant.graphs:
            if planned.name.startswith("step") and planned.name in GRAPHS:
                made = module_of(model, variant, planned)
                found[variant.target, planned.name] = capture(made.module, made.plan)
    return found


def prompt_of(asked: Asked) -> Prompt:
    """As a session passes it to a decoder."""
    end = asked.num_prompt
    return Prompt(
        embeds=asked.rows[0, :end].numpy(),
        positions=asked.positions[:end].numpy(),
        next_position=float(asked.positions[end - 1]) + 1,
        picture_rows=asked.starts,
        row_weights={kind: x[:end] for kind, x in asked.weights.items()},
    )


def used_slots(decoder: StepDecoder) -> dict[str, int]:
    """The used slots of every state group."""
    return {group.name: group.used for group in decoder._groups}


def answered(decoder: StepDecoder, asked: Asked, answer: Sequence[int]) -> np.ndarray:
    """Logits [A + 1, V] behind a prompt and behind each token of an answer."""
    rows = [decoder.prefill(prompt_of(asked)).logits[0].copy()]
    rows += [decoder.extend([token]).logits[0].copy() for token in answer]
    return np.stack(rows)
