"""Scales for the inputs of a float model, found layer by layer on calibration samples, and folded.

What comes out of a layer stays as it was, so every input is seen once, as the float model has it.
A layer's scales are kept in the work folder: an interrupted run finds none of them twice, and comes
to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgevlm.evidence.fed import Visual
from edgevlm.model.vlm import Vlm
from edgevlm.passes.base import Context
from edgevlm.quant.absorb import Absorber, divide
from edgevlm.quant.calibrate import (
    CalibrationCase,
    decoder_calls,
    encode_features,
    project_features,
    run_head,
    vision_calls,
)
from edgevlm.quant.observe import Observer, Run, drawn_cases, observe

__all__ = ["Method", "Scaling", "equalize"]

SeenT = TypeVar("SeenT", bound=Observer)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scaling:
    """What an input is divided by [K], float32, and numbers that say what that is good for."""

    scale: Tensor
    measures: Mapping[str, float] = field(default_factory=dict)


class Method(Protocol[SeenT]):
    """How scales are found."""

    def observer(self, site: str, columns: int) -> SeenT:
        """An empty record of the input of a site."""
        ...

    def scaling(self, absorber: Absorber, weights: Sequence[Tensor], seen: SeenT) -> Scaling:
        """The scale of an input from its record, and from the weights [N, K] that read it."""
        ...


@torch.no_grad()
def equalize(
    model: Vlm,
    absorbers: Sequence[Absorber],
    method: Method[SeenT],
    context: Context,
    *,
    name: str,
) -> dict[str, float]:
    """Scale these inputs, in place; the number of samples, and each measure's mean over all inputs.

    Raises PassError of the pass `name` without calibration samples.
    """
    cases = drawn_cases(context, model.spec, name=name, site=absorbers[0].sites[0])
    units = list(dict.fromkeys(absorber.unit for absorber in absorbers))
    done: list[Scaling] = []
    with context.progress.stage(name, len(units)) as advance:
        for unit, run in _runs(model, cases, units):
            members = [absorber for absorber in absorbers if absorber.unit == unit]
            if not members:
                run()
                continue
            kept = None if context.work is None else context.work / f"{unit}.safetensors"
            if kept is not None and kept.exists():
                run()
                found = _restored(members, kept)
            else:
                found = _found(model, members, method, run)
                if kept is not None:
                    _keep(members, found, kept)
            for absorber, scaling in zip(members, found, strict=True):
                divide(model, absorber, scaling.scale)
            done += found
            advance(1)
    measures = {"inputs": float(len(done)), "samples": float(len(cases))}
    for key in done[0].measures:
        measures[key] = sum(scaling.measures[key] for scaling in done) / len(done)
    return measures


def _found(
    model: Vlm, members: Sequence[Absorber], method: Method[SeenT], run: Run
) -> list[Scaling]:
    """Run a unit, and find the scales of its inputs."""
    weights = [
        [model.get_submodule(site).get_parameter("weight") for site in absorber.sites]
        for absorber in members
    ]
    seen = {
        absorber.sites[0]: method.observer(absorber.sites[0], parts[0].shape[1])
        for absorber, parts in zip(members, weights, strict=True)
    }
    observe(model, seen, run)
    return [
        method.scaling(absorber, parts, seen[absorber.sites[0]])
        for absorber, parts in zip(members, weights, strict=True)
    ]


def _runs(
    model: Vlm, cases: Sequence[CalibrationCase], units: Sequence[str]
) -> Iterator[tuple[str, Run]]:
    """Every unit up to the last that is wanted, in the order of computation, and how to run it.

    Each is run once before the next is asked for. A part of the model that has no unit among those
    wanted, and none after it, is left out.
    """
    parts = {unit.split(".")[0] for unit in units}
    if "vision" in parts:
        calls = vision_calls(model, cases)
        for index in range(len(model.vision.layers)):
            yield f"vision.layers.{index}", partial(calls.advance, index)
    visual: list[Visual | None] = []
    if parts & {"projector", "decoder"}:
        features = encode_features(model, cases)
        yield "projector", lambda: visual.extend(project_features(model, cases, features))
        features = []
    if "decoder" in parts:
        deep = decoder_calls(model, model.decoder, cases, visual, answers=True)
        for index in range(len(model.decoder.layers)):
            yield f"decoder.layers.{index}", partial(deep.advance, index)
        if "decoder.head" in units:
            yield "decoder.head", lambda: run_head(model.decoder, deep.rows)


def _keep(members: Sequence[Absorber], found: Sequence[Scaling], path: Path) -> None:
    """Write the scales of a unit, whole or not at all."""
    tensors = {}
    for absorber, scaling in zip(members, found, strict=True):
        site = absorber.sites[0]
        tensors[f"{site}/scale"] = scaling.scale.contiguous()
        for key, value in scaling.measures.items():
            tensors[f"{site}/measures/{key}"] = torch.tensor(value, dtype=torch.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part)
    part.rename(path)


def _restored(members: Sequence[Absorber], path: Path) -> list[Scaling]:
    tensors = load_file(path)
    found = []
    for absorber in members:
        prefix = f"{absorber.sites[0]}/measures/"
        measures = {
            key.removeprefix(prefix): float(value)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        found.append(Scaling(scale=tensors[f"{absorber.sites[0]}/scale"], measures=measures))
    return found
