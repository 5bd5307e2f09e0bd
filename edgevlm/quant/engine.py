"""Quantizes a model unit by unit, each on what the quantized units before it give.

What must be known of an input is gathered while a unit (a layer, the projector, the head) runs in
float on the calibration samples: its range where activations have constant scales, the products of
its columns where rounding looks at them. Then the unit's maps are replaced, and it runs again for
the input of the next. A finished unit is kept in the work folder, so an interrupted run goes on
with the next one, and comes to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from edgevlm.evidence.fed import Visual
from edgevlm.model.decoder import Decoder
from edgevlm.model.quantized import QuantLinear
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm, place
from edgevlm.passes.base import Context
from edgevlm.quant.calibrate import (
    CalibrationCase,
    LayerCalls,
    decoder_calls,
    embed_pictures,
    encode_features,
    project_features,
    run_head,
    vision_calls,
)
from edgevlm.quant.kv import calibrate_cache
from edgevlm.quant.observe import Run, drawn_cases, observe
from edgevlm.quant.options import SchemeOptions
from edgevlm.quant.rounding import quantized_linear, quantized_table
from edgevlm.quant.sites import linear_sites
from edgevlm.quant.statistics import Statistics, Wanted, wanted_of

__all__ = ["quantize_model"]


@torch.no_grad()
def quantize_model(
    model: Vlm,
    spec: VlmSpec,
    options: Mapping[str, SchemeOptions],
    context: Context,
    *,
    bias_correction: bool = False,
) -> dict[str, float]:
    """Make the model that of `spec`; returns what the weights take, and the samples seen.

    `options` say for each site of the spec's schemes how its numbers are found. Raises PassError
    where calibration samples are needed and there are none.
    """
    job = Job(model, spec, options, bias_correction, context)
    if spec.has_prefill:
        model.split_phases()
    shapes = {site: job.linear(site).weight.shape for site in spec.schemes}
    if spec.table is not None:
        model.embedding = quantized_table(model.embedding, spec.table)
    model.spec = spec
    with context.progress.stage("quantize", job.num_units) as advance:
        for _ in job.units():
            advance(1)
    if spec.table is not None and spec.head_is_table:
        # One set of numbers, those that the head's method found.
        for name in ("weight", "scale"):
            setattr(model.embedding, name, model.decoder.head.get_parameter(name))
    model.tie()
    return {
        "mib_float32": sum(4 * shape.numel() for shape in shapes.values()) / 2**20,
        "mib_quantized": sum(
            spec.schemes[site].weights.nbytes(*shape) for site, shape in shapes.items()
        )
        / 2**20,
        "samples": float(len(job.cases)),
    }


class Job:
    """One model being quantized."""

    def __init__(
        self,
        model: Vlm,
        spec: VlmSpec,
        options: Mapping[str, SchemeOptions],
        bias_correction: bool,
        context: Context,
    ) -> None:
        """Draw the calibration samples, where any site needs them."""
        self.model, self.schemes, self.options = model, spec.schemes, options
        self.work = context.work
        self._wanted = {
            site: wanted_of(scheme, options[site], bias_correction)
            for site, scheme in spec.schemes.items()
        }
        sites = linear_sites(spec)
        # What a map reads in the decoder, its twin reads in the one for prompts.
        self._readers = {
            site: sites[site.replace("prefill.", "decoder.", 1)].reader for site in spec.schemes
        }
        self._kv = spec.decoder.layers[0].attention.kv
        self.cases: Sequence[CalibrationCase] = ()
        calibrated = [site for site, wanted in self._wanted.items() if wanted]
        if self._kv is not None:
            calibrated.append("decoder.layers.0.attention.core")
        if calibrated:
            self.cases = drawn_cases(context, model.spec, name="quantize", site=calibrated[0])

    @property
    def num_units(self) -> int:
        """How many units there are."""
        return len({_unit_of(site) for site in self.schemes})

    def units(self) -> Iterator[str]:
        """Quantize unit by unit."""
        yield from self._vision()
        features = encode_features(self.model, self.cases) if self._calibrates("projector") else []
        run = None if not features else lambda: project_features(self.model, self.cases, features)
        yield from self._unit("projector", run)
        needs_rows = self._calibrates("decoder", "prefill") or self._kv is not None
        visual: list[Visual | None] = []
        if needs_rows:
            features = features or encode_features(self.model, self.cases)
            visual = project_features(self.model, self.cases, features)
        features = []
        if self._kv is not None:
            calibrate_cache(self.model, self._kv, self.cases, visual)
        if self.model.prefill is not None:
            yield from self._decoder("prefill", self.model.prefill, visual)
        yield from self._decoder("decoder", self.model.decoder, visual)

    def linear(self, site: str) -> nn.Linear:
        """The float map at a site."""
        linear = self.model.get_submodule(site)
        assert isinstance(linear, nn.Linear), site
        return linear

    def _vision(self) -> Iterator[str]:
        model = self.model
        calibrates = self._calibrates("vision")
        run: Run | None = (lambda: embed_pictures(model, self.cases)) if calibrates else None
        yield from self._unit("vision.embed", run)
        calls = vision_calls(model, self.cases) if calibrates else None
        yield from self._layers("vision", model.vision.layers, calls)

    def _decoder(
        self, name: str, decoder: Decoder, visual: Sequence[Visual | None]
    ) -> Iterator[str]:
        calls = None
        if self._calibrates(name):
            calls = decoder_calls(
                self.model, decoder, self.cases, visual, answers=name == "decoder"
            )
        yield from self._layers(name, decoder.layers, calls)
        if name == "decoder":
            states = calls.rows if calls is not None else []
            run: Run | None = None
            if states:
                run = partial(run_head, decoder, states)
            yield from self._unit("decoder.head", run)

    def _layers(
        self, name: str, layers: nn.ModuleList, calls: LayerCalls[Any] | None
    ) -> Iterator[str]:
        for index in range(len(layers)):
            run: Run | None = None
            if calls is not None:
                run = lambda index=index: list(calls.run(index))  # noqa: E731
            yield from self._unit(f"{name}.layers.{index}", run)
            if calls is not None:
                calls.advance(index)

    def _unit(self, name: str, run: Run | None) -> Iterator[str]:
        """Quantize the maps of a unit, or put in place what an interrupted run made of them."""
        sites = [site for site in self.schemes if _unit_of(site) == name]
        if not sites:
            return
        kept = None if self.work is None else self.work / f"{name}.safetensors"
        if kept is not None and kept.exists():
            self._restore(sites, kept)
        else:
            statistics = self._statistics(sites, run)
            made = {
                site: quantized_linear(
                    self.linear(site),
                    self.schemes[site],
                    self.options[site],
                    statistics.get(self._readers[site]),
                    site=site,
                )
                for site in sites
            }
            for site, module in made.items():
                self.model.set_submodule(site, module)
            if kept is not None:
                _keep(made, kept)
        yield name

    def _statistics(self, sites: Sequence[str], run: Run | None) -> dict[str, Statistics]:
        """What the sites' inputs are like, by what they read."""
        wanted: dict[str, Wanted] = {}
        first: dict[str, str] = {}
        for site in sites:
            reader = self._readers[site]
            wanted[reader] = wanted.get(reader, Wanted()) | self._wanted[site]
            first.setdefault(reader, site)
        gathered = {
            reader: Statistics(
                first[reader],
                self.linear(first[reader]).in_features,
                what,
                answers=self._answers(first[reader]),
            )
            for reader, what in wanted.items()
            if what
        }
        if not gathered:
            return {}
        assert run is not None, f"{sites[0]} is calibrated"
        observe(self.model, {first[reader]: seen for reader, seen in gathered.items()}, run)
        return gathered

    def _answers(self, site: str) -> list[int]:
        """How many rows of each sample's input predict its answer; the first ends the prompt."""
        if not site.startswith("decoder."):
            return []
        return [len(case.answer) for case in self.cases]

    def _restore(self, sites: Sequence[str], kept: Path) -> None:
        with safe_open(kept, framework="pt") as tensors:
            for site in sites:
                linear = self.linear(site)
                rows, columns = linear.weight.shape
                module = QuantLinear(rows, columns, linear.bias is not None, self.schemes[site])
                for name in [name for name, _ in module.named_parameters()]:
                    # Copied, so that it is aligned: sums of other kernels differ in the last bits.
                    place(module, name, tensors.get_tensor(f"{site}/{name}").clone())
                self.model.set_submodule(site, module)

    def _calibrates(self, *parts: str) -> bool:
        """Whether any site of these parts looks at samples."""
        return any(wanted for site, wanted in self._wanted.items() if site.split(".")[0] in parts)


def _unit_of(site: str) -> str:
    """The layer, the projector or the head that a site is in."""
    parts = site.split(".")
    if parts[0] == "projector":
        return parts[0]
    return ".".join(parts[:3] if parts[1] == "layers" else parts[:2])


def _keep(made: dict[str, QuantLinear], path: Path) -> None:
    """Write the tensors of a finished unit, whole or not at all."""
    tensors = {
        f"{site}/{name}": weight.detach().contiguous()
        for site, module in made.items()
        for name, weight in module.named_parameters()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part)
    part.rename(path)
