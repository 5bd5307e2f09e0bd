"""Mixed precision: which sites get more bits, so that the model fits a budget with least harm.

Every site begins with the scheme of its component and may be raised to finer ones, or to float. The
harm of each choice is measured: KL of the logits on calibration samples with that site alone
quantized so. Harms are taken to add up, which `edgevlm.quant.mixed` then solves exactly; what the
chosen model really loses is measured after that, and is what a budget of accuracy is held to.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from edgevlm.errors import PassError
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm
from edgevlm.passes.base import Context
from edgevlm.quant.assign import Assignment, scheme_of
from edgevlm.quant.calibrate import CalibrationCase
from edgevlm.quant.engine import quantize_model
from edgevlm.quant.harm import logits_along, site_harms
from edgevlm.quant.mixed import Choice, Mix, least_bytes, least_harm
from edgevlm.quant.options import FLOAT, BudgetOptions, SchemeOptions
from edgevlm.quant.sites import linear_sites
from edgevlm.quant.spec import Scheme

__all__ = ["Solved", "solve_budget"]

LEVELS = 24
"""Budgets of harm, evenly apart in their logarithms, among which that of an accuracy is sought."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solved:
    """The assignment that a budget chose, and what is known of it.

    `drop` is the share of calibration samples whose right answer the float model gives and this one
    does not; `bound` how far the sum of harms can be from the best.
    """

    assignment: Assignment
    nbytes: int
    harm: float
    bound: float
    drop: float


@torch.no_grad()
def solve_budget(
    model: Vlm, spec: VlmSpec, assignment: Assignment, budget: BudgetOptions, context: Context
) -> Solved:
    """Choose a scheme for every site of an assignment, which has the coarsest of each.

    Raises PassError where there are no calibration samples, or no choice fits the budget.
    """
    cases = context.calibration(model.spec) if context.calibration is not None else ()
    if not cases:
        raise PassError(
            "a budget is measured, and there are no calibration samples",
            name="quantize",
            hint="name a folder in calibration.data, or leave it out for the picture world",
        )
    levels = _levels(assignment, budget, context)
    sites = linear_sites(spec)
    options: dict[str, list[Choice]] = {site: [] for site in assignment.schemes}
    telling = sorted(cases, key=lambda case: -len(case.answer))[: budget.samples]
    for name, (schemes, wishes) in levels.items():
        harms = _harms(model, spec, schemes, wishes, telling, context)
        for site, scheme in schemes.items():
            rows, columns = sites[site].rows, sites[site].columns
            nbytes = scheme.weights.nbytes(rows, columns)
            options[site].append(Choice(name=name, nbytes=nbytes, harm=harms[site]))
    if FLOAT in budget.finer:
        for site, choices in options.items():
            choices.append(Choice(name=FLOAT, nbytes=4 * sites[site].numbers, harm=0.0))
    if budget.max_mib is not None:
        mix = least_harm(options, max_bytes=int(budget.max_mib * 2**20))
        chosen = _chosen(assignment, levels, mix)
        return _solved(chosen, mix, _drop(model, spec, chosen, cases, context))
    return _for_accuracy(model, spec, assignment, levels, options, budget, cases, context)


Level = tuple[dict[str, Scheme], dict[str, SchemeOptions]]


def _levels(assignment: Assignment, budget: BudgetOptions, context: Context) -> dict[str, Level]:
    """What every site would get, by the name of the choice."""
    levels: dict[str, Level] = {"as asked": (dict(assignment.schemes), dict(assignment.options))}
    for wish in budget.finer:
        if isinstance(wish, SchemeOptions):
            scheme = scheme_of(wish, context.device, context.targets)
            levels[str(scheme)] = (
                dict.fromkeys(assignment.schemes, scheme),
                dict.fromkeys(assignment.options, wish),
            )
    return levels


def _harms(
    model: Vlm,
    spec: VlmSpec,
    schemes: Mapping[str, Scheme],
    wishes: Mapping[str, SchemeOptions],
    cases: Sequence[CalibrationCase],
    context: Context,
) -> dict[str, float]:
    """The harm of every site alone."""
    quantized = copy.deepcopy(model)
    quantize_model(quantized, replace(spec, schemes=dict(schemes)), wishes, _aside(context))
    return {harm.site: harm.kl for harm in site_harms(model, quantized, cases, context.progress)}


def _for_accuracy(
    model: Vlm,
    spec: VlmSpec,
    assignment: Assignment,
    levels: Mapping[str, Level],
    options: Mapping[str, Sequence[Choice]],
    budget: BudgetOptions,
    cases: Sequence[CalibrationCase],
    context: Context,
) -> Solved:
    """The fewest bytes whose model keeps its answers, by bisection over budgets of harm."""
    assert budget.max_accuracy_drop is not None
    most = sum(max(choice.harm for choice in choices) for choices in options.values())
    least = sum(min(choice.harm for choice in choices) for choices in options.values())
    floor = max(least, most * 1e-6)
    ladder = [floor * (most / floor) ** (level / (LEVELS - 1)) for level in range(LEVELS)]
    found: Solved | None = None
    low, high = -1, LEVELS
    with context.progress.stage("budget", LEVELS.bit_length()) as advance:
        while high - low > 1:
            middle = (low + high) // 2
            mix = least_bytes(options, max_harm=max(ladder[middle], least))
            chosen = _chosen(assignment, levels, mix)
            drop = _drop(model, spec, chosen, cases, context)
            if drop <= budget.max_accuracy_drop:
                low, found = middle, _solved(chosen, mix, drop)
            else:
                high = middle
            advance(1)
    if found is None:
        raise PassError(
            f"even the gentlest choices lose more than {budget.max_accuracy_drop:.1%} of the "
            "calibration samples",
            name="quantize",
            hint="allow a larger drop, or finer schemes in budget.finer",
        )
    return found


def _chosen(assignment: Assignment, levels: Mapping[str, Level], mix: Mix) -> Assignment:
    """The assignment of a mix; sites that stay in float are skipped."""
    schemes, wishes = {}, {}
    skipped = dict(assignment.skipped)
    for site, name in mix.choices.items():
        if name == FLOAT:
            skipped[site] = "the budget has room for it in float, where it does no harm"
        else:
            schemes[site], wishes[site] = levels[name][0][site], levels[name][1][site]
    return replace(assignment, schemes=schemes, options=wishes, skipped=skipped)


def _drop(
    model: Vlm,
    spec: VlmSpec,
    chosen: Assignment,
    cases: Sequence[CalibrationCase],
    context: Context,
) -> float:
    """The share of samples whose right answer is lost, net of those that are won."""
    quantized = copy.deepcopy(model)
    shaped = replace(spec, schemes=dict(chosen.schemes))
    quantize_model(quantized, shaped, chosen.options, _aside(context))
    return _right(model, cases) - _right(quantized, cases)


def _right(model: Vlm, cases: Sequence[CalibrationCase]) -> float:
    """The share of samples whose right answer a model would give, token for token."""
    logits = logits_along(model, cases)
    right = [
        tuple(int(token) for token in rows.argmax(axis=1)) == case.answer
        for case, rows in zip(cases, logits, strict=True)
    ]
    return sum(right) / len(right)


def _solved(chosen: Assignment, mix: Mix, drop: float) -> Solved:
    return Solved(assignment=chosen, nbytes=mix.nbytes, harm=mix.harm, bound=mix.bound, drop=drop)


def _aside(context: Context) -> Context:
    """The context of a trial, which keeps nothing for the next run."""
    return replace(context, work=None)
