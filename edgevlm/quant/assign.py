"""Which linear map gets which scheme: a recipe's wishes, settled for targets and a device.

A component has a scheme, a phase may have another, and a rule for single sites wins over both, the
last that matches. What a device does not compute is refused here, from its file alone.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from edgevlm.decisions import Decision
from edgevlm.device import Device, DtypeFact
from edgevlm.document import suggest
from edgevlm.errors import PassError
from edgevlm.model.spec import VlmSpec
from edgevlm.quant.options import SchemeOptions, SiteOptions
from edgevlm.quant.sites import LinearSite, linear_sites
from edgevlm.quant.spec import DTYPE_BITS, SCHEMES, ActivationQuant, Scheme, WeightQuant
from edgevlm_export.forms import FORMS

__all__ = ["Assignment", "Wishes", "assign", "scheme_of"]

GROUP_SIZE = 32
"""Group of 4-bit weights where a recipe names none: what the peers ship."""

STATIC_BITS = 16

NEW_OPSET = 21

PROMPT_ROWS = 256
"""Rows of the prompt that predictions are made for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What a recipe asks: a scheme by component, one for prompts, and rules for sites."""

    components: Mapping[str, SchemeOptions]
    prefill: SchemeOptions | None = None
    rules: Sequence[SiteOptions] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """The schemes of all sites, in the order of computation, with the options they came from.

    Sites under `prefill` are those of the decoder for prompts. `skipped` has the linear maps that
    stay in float, each with the reason.
    """

    schemes: Mapping[str, Scheme]
    options: Mapping[str, SchemeOptions]
    skipped: Mapping[str, str] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()


def assign(wishes: Wishes, spec: VlmSpec, device: Device, targets: Sequence[str]) -> Assignment:
    """Settle all wishes; raise PassError for a rule that matches no site."""
    sites = linear_sites(spec)
    if wishes.prefill is not None:
        prompts = {
            site.replace("decoder.", "prefill.", 1): linear
            for site, linear in sites.items()
            if linear.component == "decoder"
        }
        sites |= prompts
    _check_rules(wishes.rules, sites)
    schemes: dict[str, Scheme] = {}
    options: dict[str, SchemeOptions] = {}
    skipped = {}
    for site, linear in sites.items():
        wish, reason = _wish(wishes, site, linear)
        if wish is None:
            skipped[site] = reason
        else:
            schemes[site] = scheme_of(wish, device, targets)
            options[site] = wish
    return Assignment(
        schemes=schemes,
        options=options,
        skipped=skipped,
        decisions=_decisions(wishes, sites, schemes, options, device, targets),
    )


def scheme_of(wish: SchemeOptions, device: Device, targets: Sequence[str]) -> Scheme:
    """The scheme that a wish means on a device and its targets."""
    weight, activation = SCHEMES[wish.instead or wish.scheme]
    forms = [FORMS[target] for target in targets]
    has_static = any(form.rows for form in forms)
    is_symmetric = any(form.symmetric for form in forms)
    group_size = wish.group_size or 0
    if weight == "int4" and not wish.per_channel and not group_size:
        group_size = _usual_group(device, targets)
    activations: ActivationQuant | None
    if DTYPE_BITS[activation] == STATIC_BITS:
        # Floats are finer than 16 bits, and what a CPU has.
        activations = None
        if any(form.wide == activation for form in forms):
            activations = ActivationQuant(dtype=activation, scales="static", symmetric=is_symmetric)
    else:
        found = "block" if group_size else "token"
        usual = "static" if has_static or activation != "int8" else found
        scales: str = wish.activations or usual
        activations = ActivationQuant(dtype=activation, scales=scales, symmetric=is_symmetric)
    bits = DTYPE_BITS[weight]
    limit = device.numeric.int8_weight_bits
    multiplies = activations is not None and activations.dtype == "int8"
    if weight == "int8" and multiplies and not group_size and "ort" in targets and limit:
        bits = min(bits, limit.value)
    weights = WeightQuant(dtype=weight, bits=bits, group_size=group_size, symmetric=wish.symmetric)
    return Scheme(name=wish.instead or wish.scheme, weights=weights, activations=activations)


def _usual_group(device: Device, targets: Sequence[str]) -> int:
    """The group of 4-bit weights where none is asked for: GROUP_SIZE, or the next that there is."""
    sizes = [
        {
            size
            for fact in device.dtypes_of(target)
            if fact.weight == "int4"
            for size in fact.group_sizes
        }
        for target in targets
    ]
    shared = sorted(set.intersection(*sizes)) if sizes else []
    return next((size for size in shared if size >= GROUP_SIZE), GROUP_SIZE)


def _wish(wishes: Wishes, site: str, linear: LinearSite) -> tuple[SchemeOptions | None, str]:
    """What is asked of a site, or why nothing is."""
    wish = wishes.components.get(linear.component)
    if _is_prompt(site):
        wish = wishes.prefill
    reason = f"no scheme is asked for {linear.component}"
    for rule in wishes.rules:
        if fnmatch.fnmatchcase(site, rule.match):
            wish, reason = rule.scheme, rule.skip or ""
    return wish, reason


def _is_prompt(site: str) -> bool:
    """Whether a site is of the decoder for prompts."""
    return site.startswith("prefill.")


def _check_rules(rules: Sequence[SiteOptions], sites: Mapping[str, LinearSite]) -> None:
    for rule in rules:
        if not any(fnmatch.fnmatchcase(site, rule.match) for site in sites):
            first, *_, last = sites
            hint = suggest(rule.match, list(sites)) or f"maps have names as {first!r} and {last!r}"
            if rule.match.startswith("prefill") and not any(map(_is_prompt, sites)):
                hint = "name a scheme for prefill; without one the decoder's maps read prompts too"
            raise PassError(
                f"{rule.match!r} matches none of the {len(sites)} linear maps",
                name="quantize",
                hint=hint,
            )


def _decisions(
    wishes: Wishes,
    sites: Mapping[str, LinearSite],
    schemes: Mapping[str, Scheme],
    options: Mapping[str, SchemeOptions],
    device: Device,
    targets: Sequence[str],
) -> tuple[Decision, ...]:
    """One decision for each scheme of a part of the model."""
    parts: dict[tuple[str, Scheme, str], list[str]] = {}
    for site, scheme in schemes.items():
        part = "prefill" if _is_prompt(site) else sites[site].component
        parts.setdefault((part, scheme, options[site].scheme), []).append(site)
    decisions = _opset_decisions(schemes.values(), device, targets)
    for (part, scheme, name), members in parts.items():
        numbers = sum(sites[site].numbers for site in members)
        size = sum(scheme.weights.nbytes(sites[site].rows, sites[site].columns) for site in members)
        effect = (
            f"{len(members)} linear maps, {4 * numbers / 2**20:,.1f} MiB as float32, "
            f"{size / 2**20:,.1f} MiB as {scheme}"
        )
        if part == "prefill":
            effect += ", held beside the weights of decode" + _gain(
                numbers, scheme, wishes.components.get("decoder"), device, targets
            )
        asked = f"quantize {part} {scheme.name}"
        refusal = _seen_by_neighbours(asked, scheme, part) or next(
            (
                decision
                for target in targets
                if (decision := _refusal(asked, scheme, device, target)) is not None
            ),
            None,
        )
        decisions.append(
            refusal
            or _applied(
                f"quantize {part} {name}",
                scheme,
                device,
                targets,
                {site: sites[site] for site in members},
                instead="" if name == scheme.name else scheme.name,
                effect=effect,
            )
        )
    return tuple(decisions)


def _opset_decisions(
    schemes: Iterable[Scheme], device: Device, targets: Sequence[str]
) -> list[Decision]:
    """The newer opset that int16, int4 and groups need in forms of standard ops."""
    if not any(scheme.needs_opset_21 for scheme in schemes):
        return []
    newest = device.compile.opset_max.value
    decisions = []
    for target in targets:
        usual = FORMS[target].opset
        if FORMS[target].rows and usual < NEW_OPSET:
            is_old = newest < NEW_OPSET
            decisions.append(
                Decision(
                    asked=f"opset {usual} of target {target!r}",
                    outcome="refused" if is_old else "degraded",
                    reason=f"int16, int4 and groups need opset {NEW_OPSET}"
                    + (f", {device.name} loads opset {newest} at most" if is_old else ""),
                    effect="choose w8a8 or fp8 per channel"
                    if is_old
                    else f"graphs are opset {NEW_OPSET}",
                )
            )
    return decisions


def _gain(
    numbers: int,
    scheme: Scheme,
    other: SchemeOptions | None,
    device: Device,
    targets: Sequence[str],
) -> str:
    """What weights of their own save a prompt, predicted from the device's best speeds."""
    usual = None if other is None else scheme_of(other, device, targets)
    speeds = [device.peak.get(_speed_of(candidate)) for candidate in (scheme, usual)]
    if speeds[0] is None or speeds[1] is None:
        return ""
    ours, theirs = (
        2e3 * PROMPT_ROWS * numbers / speed.base for speed in speeds if speed is not None
    )
    return (
        f"; predicted from {device.name}'s peaks, {PROMPT_ROWS} rows take {ours:,.0f} ms of "
        f"products instead of {theirs:,.0f}"
    )


def _speed_of(scheme: Scheme | None) -> str:
    """The key of a device's peaks that says how fast a scheme's products are."""
    if scheme is None:
        return "float32"
    activations = scheme.activations
    if activations is not None and activations.dtype == "int8" and not scheme.weights.group_size:
        return "int8"
    return "int4" if scheme.weights.dtype == "int4" else "float32"


def _applied(
    asked: str,
    scheme: Scheme,
    device: Device,
    targets: Sequence[str],
    members: Mapping[str, LinearSite],
    *,
    instead: str,
    effect: str,
) -> Decision:
    """The decision of a scheme that the device computes, with what it costs.

    `instead` is its name where the recipe asks for another and allows this one.
    """
    notes = []
    if instead:
        notes.append(f"{instead} was named in its place: activations are rounded to int8")
    if scheme.weights.bits < DTYPE_BITS[scheme.weights.dtype]:
        notes.append(
            f"{device.name} is exact for weights of {scheme.weights.bits} bits: they are kept to "
            "these"
        )
    size = scheme.weights.group_size
    short = [site for site, linear in members.items() if size and linear.columns % size]
    reason = "; ".join(notes) or f"{device.name} computes it on {', '.join(targets)}"
    if short:
        effect += f"; {len(short)} maps end in a short group, the first is {short[0]}"
    return Decision(
        asked=asked, outcome="degraded" if notes else "applied", reason=reason, effect=effect
    )


def _seen_by_neighbours(asked: str, scheme: Scheme, part: str) -> Decision | None:
    """The refusal of one scale for a whole call where calls are cut at will."""
    activations = scheme.activations
    if activations is None or activations.scales != "tensor" or part in ("vision", "projector"):
        return None
    return Decision(
        asked=f"{asked} with activations: tensor",
        outcome="refused",
        reason="a row would change with the rows beside it, and a prompt with how it is cut",
        effect="choose activations: token, or static",
    )


def _refusal(asked: str, scheme: Scheme, device: Device, target: str) -> Decision | None:
    """The refusal of a scheme on a target, or None where the device computes it."""
    if FORMS[target].symmetric and not scheme.weights.symmetric:
        return Decision(
            asked=f"{asked} with symmetric: false on {target!r}",
            outcome="refused",
            reason="its scales have no zero points",
            effect="remove symmetric: false",
        )
    facts = [
        fact
        for fact in device.dtypes_of(target)
        if fact.weight == scheme.weights.dtype and _multiplies(fact, scheme, target)
    ]
    activations = scheme.activations
    if not facts and activations is not None and (ways := _scales_of(scheme, device, target)):
        return Decision(
            asked=f"{asked} with activations: {activations.scales} on {target!r}",
            outcome="refused",
            reason=f"{device.name} has kernels for activations: {' and '.join(ways)}",
            effect="set activations accordingly",
        )
    if not facts:
        known = sorted(
            {
                f"{fact.weight} x {fact.activation}"
                for fact in device.dtypes_of(target)
                if fact.granularity is not None
            }
        )
        dtype = "float32" if activations is None else activations.dtype
        return Decision(
            asked=f"{asked} on {target!r}",
            outcome="refused",
            reason=f"{device.name} multiplies no {scheme.weights.dtype} by {dtype} there",
            effect=f"it multiplies {', '.join(known)}",
        )
    for fact in facts:
        is_group = fact.granularity == "group"
        if is_group == bool(scheme.weights.group_size) and (
            not is_group or scheme.weights.group_size in fact.group_sizes
        ):
            return None
    ways = [
        f"groups of {', '.join(map(str, fact.group_sizes))}"
        if fact.granularity == "group"
        else "whole channels"
        for fact in facts
    ]
    size = scheme.weights.group_size
    asked_for = f"groups of {size}" if size else "whole channels"
    return Decision(
        asked=f"{asked} in {asked_for} on {target!r}",
        outcome="refused",
        reason=f"{device.name} has kernels for {' and '.join(dict.fromkeys(ways))}",
        effect="set group_size or per_channel accordingly",
    )


def _scales_of(scheme: Scheme, device: Device, target: str) -> list[str]:
    """What may share a scale of activations, in the kernels of these weights and activations."""
    assert scheme.activations is not None
    pair = scheme.weights.dtype, scheme.activations.dtype
    facts = (fact for fact in device.dtypes_of(target) if (fact.weight, fact.activation) == pair)
    return list(dict.fromkeys(scales for fact in facts for scales in fact.scales))


def _multiplies(fact: DtypeFact, scheme: Scheme, target: str) -> bool:
    """Whether a kernel takes the activations of a scheme; where there are none, floats."""
    activations = scheme.activations
    if activations is None:
        return fact.activation.startswith(("float32", "float16", "bfloat16"))
    if activations.dtype == "int16" and not FORMS[target].rows:
        # Floats are finer: this form leaves the activations as they are.
        return fact.activation == "float32"
    return fact.activation == activations.dtype and activations.scales in fact.scales
