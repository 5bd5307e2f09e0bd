"""Quantize linear maps: a scheme for each component, one for each phase, rules for single sites.

    - quantize:
        vision: w8a8
        decoder: {scheme: w4a16, method: gptq}
        prefill: w8a8
        head: w4a16
        sites: [{match: "decoder.layers.0.mlp.down", skip: it does the most harm}]

Norms, softmax and rotary angles are no linear maps and stay in float. A convolution that makes
patches stays too: it is under a hundredth of the products, and the first thing that errs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from edgevlm.document import Complaint
from edgevlm.errors import PassError
from edgevlm.passes.base import Change, Context, Foresight, Pass
from edgevlm.quant.memory import budget_decisions, cache_decisions, shaped, table_decisions
from edgevlm.quant.options import (
    BudgetOptions,
    KvOptions,
    SchemeOptions,
    SiteOptions,
    TableOptions,
)
from edgevlm.quant.sites import COMPONENTS

if TYPE_CHECKING:
    from edgevlm.decisions import Decision
    from edgevlm.model.spec import Scheme, VlmSpec
    from edgevlm.model.vlm import Vlm
    from edgevlm.quant.assign import Assignment

PATCHES = "a convolution of patches stays in float: few products, and all that follows reads it"


class Quantize(Pass):
    """Schemes by component, phase and site."""

    name: ClassVar[str] = "quantize"
    calibrates: ClassVar[bool] = True

    vision: SchemeOptions | None = Field(None, description="The vision encoder.")
    projector: SchemeOptions | None = Field(None, description="What maps features to rows.")
    decoder: SchemeOptions | None = Field(None, description="Layers of the language model.")
    prefill: SchemeOptions | None = Field(
        None,
        description="The same layers where they read prompts; absent: as `decoder`. Both sets of "
        "weights are held.",
    )
    head: SchemeOptions | None = Field(None, description="Rows to logits.")
    kv: KvOptions | None = Field(None, description="The cache of keys and values.")
    embedding: TableOptions | None = Field(None, description="The table of token embeddings.")
    sites: tuple[SiteOptions, ...] = Field((), description="Rules for single sites, last wins.")
    budget: BudgetOptions | None = Field(
        None, description="Raise the sites that do most harm, as far as a budget goes."
    )
    bias_correction: bool = Field(
        False, description="Add to biases what rounding takes from the mean of an output."
    )
    strict: bool = Field(
        False, description="Fail the compile where the audit finds another precision than asked."
    )

    @model_validator(mode="after")
    def _budget_has_one_phase(self) -> Quantize:
        if self.budget is not None and self.prefill is not None:
            raise Complaint(
                "a budget is for one set of weights, and prefill has its own",
                hint="remove prefill, or budget",
                key="budget",
            )
        return self

    def foresee(self, spec: VlmSpec, context: Context) -> Foresight:
        """The schemes of all sites; kernels that the device lacks are refused."""
        if spec.is_quantized:
            raise PassError(
                "the model is quantized already", name=self.name, hint="make one of the two passes"
            )
        assignment = self.assign(spec, context)
        if not (assignment.schemes or self.kv or self.embedding):
            raise PassError(
                "it quantizes nothing",
                name=self.name,
                hint="name a scheme for vision, projector, decoder or head, or remove the pass",
            )
        has_prefill = self.prefill is not None
        caches = cache_decisions(self.kv, spec, context.targets, has_prefill=has_prefill)
        # A cache that no step can keep has no plan; its decision says so.
        is_refused = any(decision.outcome == "refused" for decision in caches)
        kv = None if is_refused else self.kv
        after = shaped(spec, assignment.schemes, kv, self.embedding)
        return Foresight(
            spec=after,
            effect=f"{len(assignment.schemes)} linear maps quantized",
            decisions=(
                *assignment.decisions,
                *caches,
                *budget_decisions(self.budget, assignment, spec),
                *self._refused_choices(spec, context),
                *table_decisions(self.embedding, after, context.targets),
            ),
        )

    def _refused_choices(self, spec: VlmSpec, context: Context) -> Iterator[Decision]:
        """What a budget may raise maps to, and the device does not compute."""
        for wish in () if self.budget is None else self.budget.finer:
            if isinstance(wish, SchemeOptions):
                parts = {part: wish for part in COMPONENTS if getattr(self, part) is not None}
                raised = self.model_copy(update=parts).assign(spec, context).decisions
                yield from (decision for decision in raised if decision.outcome == "refused")

    def reshape(self, spec: VlmSpec, change: Change, context: Context) -> VlmSpec:
        """The schemes that were given, which a budget may have chosen."""
        schemes = {site: scheme_from(data) for site, data in change.schemes.items()}
        return self._shaped(spec, schemes)

    def _shaped(self, spec: VlmSpec, schemes: Mapping[str, Scheme]) -> VlmSpec:
        """A spec with these schemes, and with what is asked of the cache and the table."""
        return shaped(spec, schemes, self.kv, self.embedding)

    def apply(self, model: Vlm, context: Context) -> Change:
        """Round the weights, calibrate the activations, and put quantized maps in place."""
        from edgevlm.quant.engine import quantize_model

        assignment = self.assign(model.spec, context)
        solved: dict[str, float] = {}
        if self.budget is not None:
            from edgevlm.quant.budget import solve_budget

            found = solve_budget(
                model,
                self._shaped(model.spec, assignment.schemes),
                assignment,
                self.budget,
                context,
            )
            assignment = found.assignment
            solved = {"harm": found.harm, "accuracy_drop": found.drop}
        measures = quantize_model(
            model,
            self._shaped(model.spec, assignment.schemes),
            assignment.options,
            context,
            bias_correction=self.bias_correction,
        )
        skipped = dict(assignment.skipped)
        if model.spec.vision.pixels != "patches":
            skipped["vision.embed.patch"] = PATCHES
        sites = list(assignment.schemes)
        if self.kv is not None:
            layers = range(len(model.spec.decoder.layers))
            sites += [f"decoder.layers.{index}.attention.core" for index in layers]
        if self.embedding is not None:
            sites.append("embedding")
        return Change(
            sites=tuple(sites),
            skipped=skipped,
            measures={**measures, **solved},
            schemes={site: asdict(scheme) for site, scheme in assignment.schemes.items()},
        )

    def assign(self, spec: VlmSpec, context: Context) -> Assignment:
        """The schemes of all sites, from the spec alone."""
        from edgevlm.quant.assign import Wishes, assign

        parts: dict[str, SchemeOptions | None] = {part: getattr(self, part) for part in COMPONENTS}
        wishes = Wishes(
            components={part: wish for part, wish in parts.items() if wish is not None},
            prefill=self.prefill,
            rules=self.sites,
        )
        return assign(wishes, spec, context.device, context.targets)


def scheme_from(data: Any) -> Scheme:
    """A scheme from its plain data."""
    from edgevlm.quant.spec import ActivationQuant, Scheme, WeightQuant

    activations = data["activations"]
    return Scheme(
        name=data["name"],
        weights=WeightQuant(**data["weights"]),
        activations=None if activations is None else ActivationQuant(**activations),
    )
