"""Mixed precision: one choice per site, of least harm in a budget of bytes or the other way round.

A multiple-choice knapsack, in which harms add up. Sites are taken one after the other; of all
partial assignments those are kept that no other beats in both, and that the linear relaxation of
what is left (Sinha and Zoltners, 1979) does not rule out. Layers of one shape share their sums of
bytes, so few remain, and the answer is the best there is; where they are too many the list is
thinned, and `bound` says how far from the best the answer can be at most.
"""

# S partial assignments, C choices

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import PassError

MAX_STATES = 50_000

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way to quantize a site, or to leave it: its bytes, and the harm that it does."""

    name: str
    nbytes: int
    harm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """A choice for every site, by name, with the sums.

    No assignment has less than `bound` of what was to be least, harm or bytes: where they are
    equal, the answer is the best there is.
    """

    choices: dict[str, str]
    nbytes: int
    harm: float
    bound: float


def least_harm(
    options: Mapping[str, Sequence[Choice]],
    *,
    max_bytes: int,
    together: Sequence[Sequence[str]] = (),
) -> Mix:
    """The choices that do least harm in `max_bytes`; sites that are `together` choose alike.

    Raises PassError where even the smallest choices take more, or sites have no choice in common.
    """
    items = _items(options, together)
    costs = [np.array([choice.nbytes for choice in item.merged], np.float64) for item in items]
    values = [np.array([choice.harm for choice in item.merged], np.float64) for item in items]
    least = int(sum(cost.min() for cost in costs))
    if least > max_bytes:
        raise PassError(
            f"the smallest choices take {least:,} bytes, {max_bytes:,} are allowed",
            name="quantize",
            hint="raise max_bytes, or allow fewer bits",
        )
    return _mix(options, items, *_solve(costs, values, float(max_bytes)))


def least_bytes(
    options: Mapping[str, Sequence[Choice]],
    *,
    max_harm: float,
    together: Sequence[Sequence[str]] = (),
) -> Mix:
    """The choices of fewest bytes that do at most `max_harm`; sites `together` choose alike.

    Raises PassError where even the gentlest choices do more, or sites have no choice in common.
    """
    items = _items(options, together)
    costs = [np.array([choice.harm for choice in item.merged], np.float64) for item in items]
    values = [np.array([choice.nbytes for choice in item.merged], np.float64) for item in items]
    least = math.fsum(float(cost.min()) for cost in costs)
    if least > max_harm:
        raise PassError(
            f"the gentlest choices do a harm of {least:.4g}, {max_harm:.4g} is allowed",
            name="quantize",
            hint="raise the accuracy that may be lost, or allow more bits",
        )
    # The same harms in another order may add up to one bit more.
    return _mix(options, items, *_solve(costs, values, max_harm * (1 + 1e-12)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    """Sites that choose alike, and what they can choose, with sums over the sites."""

    sites: tuple[str, ...]
    merged: tuple[Choice, ...]


def _items(
    options: Mapping[str, Sequence[Choice]], together: Sequence[Sequence[str]]
) -> list[_Item]:
    alike = {site: tuple(group) for group in together for site in group}
    groups = dict.fromkeys(alike.get(site, (site,)) for site in options)
    items = []
    for group in groups:
        by_name = [{choice.name: choice for choice in options[site]} for site in group]
        merged = tuple(
            Choice(
                name=name,
                nbytes=sum(named[name].nbytes for named in by_name),
                harm=math.fsum(named[name].harm for named in by_name),
            )
            for name in by_name[0]
            if all(name in named for named in by_name)
        )
        if not merged:
            raise PassError(
                f"no choice is open to all of {', '.join(group)}",
                name="quantize",
                site=group[0],
                hint="give sites that choose alike the same choices",
            )
        items.append(_Item(sites=group, merged=merged))
    return items


def _mix(
    options: Mapping[str, Sequence[Choice]],
    items: Sequence[_Item],
    chosen: Sequence[int],
    bound: float,
) -> Mix:
    picks = [item.merged[index] for item, index in zip(items, chosen, strict=True)]
    names = {
        site: pick.name for item, pick in zip(items, picks, strict=True) for site in item.sites
    }
    return Mix(
        choices={site: names[site] for site in options},
        nbytes=sum(pick.nbytes for pick in picks),
        harm=math.fsum(pick.harm for pick in picks),
        bound=bound,
    )


def _solve(
    costs: Sequence[Floats], values: Sequence[Floats], limit: float
) -> tuple[list[int], float]:
    """One index per item of least total value within the limit on total cost, and a lower bound."""
    kept = [_undominated(cost, value) for cost, value in zip(costs, values, strict=True)]
    # Items with most at stake come first: what is ruled out is ruled out early.
    order = sorted(range(len(kept)), key=lambda item: -float(np.ptp(values[item][kept[item]])))
    tables = [(costs[item][kept[item]], values[item][kept[item]]) for item in order]
    rest = _relaxations(tables)
    picks, best = _greedy(tables, limit)
    # Sums in another order may differ in their last bits: what equals the best so far stays.
    slack = 1e-12 * sum(float(np.abs(value).max()) for _, value in tables)
    cost_S, value_S = np.zeros(1), np.zeros(1)
    trail: list[tuple[Ints, Ints]] = []
    is_thinned = False
    for (cost_C, value_C), after in zip(tables, rest[1:], strict=True):
        cost = (cost_S[:, None] + cost_C).ravel()
        value = (value_S[:, None] + value_C).ravel()
        bound = value + after.value_within(limit - cost)
        places = np.flatnonzero((cost + after.least_cost <= limit) & (bound <= best + slack))
        places = places[_undominated(cost[places], value[places])]
        if len(places) > MAX_STATES:
            places = np.sort(places[np.argsort(bound[places], kind="stable")[:MAX_STATES]])
            is_thinned = True
        trail.append((places // len(cost_C), places % len(cost_C)))
        cost_S, value_S = cost[places], value[places]
    if len(value_S) and float(value_S.min()) <= best + slack:
        state = int(value_S.argmin())
        best = float(value_S[state])
        for index in reversed(range(len(trail))):
            parents, choices = trail[index]
            picks[index], state = int(choices[state]), int(parents[state])
    chosen = [0] * len(order)
    for item, pick in zip(order, picks, strict=True):
        chosen[item] = int(kept[item][pick])
    return chosen, float(rest[0].value_within(np.array(limit))) if is_thinned else best


@dataclass(frozen=True, kw_only=True, slots=True)
class _Relaxed:
    """The least value that items can have together, where choices may be mixed in shares.

    `value` falls from corner to corner as the cost rises over `least_cost` by `extra_cost`.
    """

    least_cost: float
    extra_cost: Floats
    value: Floats

    def value_within(self, cost: Floats) -> Floats:
        """A lower bound on the value within each of these costs."""
        return np.asarray(np.interp(cost - self.least_cost, self.extra_cost, self.value))


def _relaxations(tables: Sequence[tuple[Floats, Floats]]) -> list[_Relaxed]:
    """The relaxation of every tail of the items, the empty one last."""
    steps = _steps(tables)
    items = np.array([item for item, _, _, _ in steps], np.int64)
    extra = np.array([cost for _, _, cost, _ in steps], np.float64)
    fall = np.array([value for _, _, _, value in steps], np.float64)
    relaxed = []
    for start in range(len(tables) + 1):
        is_in = items >= start
        dearest = sum(float(value[0]) for _, value in tables[start:])
        relaxed.append(
            _Relaxed(
                least_cost=sum(float(cost[0]) for cost, _ in tables[start:]),
                extra_cost=np.concatenate(([0.0], np.cumsum(extra[is_in]))),
                value=dearest + np.concatenate(([0.0], np.cumsum(fall[is_in]))),
            )
        )
    return relaxed


def _steps(tables: Sequence[tuple[Floats, Floats]]) -> list[tuple[int, int, float, float]]:
    """Steps along the lower hull of every item, the ones that gain most for their cost first.

    A step is the item, the choice that it leads to, what it costs and what it adds to the value.
    """
    steps = []
    for item, (cost, value) in enumerate(tables):
        hull = [0]
        for choice in range(1, len(cost)):
            while len(hull) > 1 and _slope(cost, value, hull[-2], hull[-1]) >= _slope(
                cost, value, hull[-1], choice
            ):
                hull.pop()
            hull.append(choice)
        for before, choice in itertools.pairwise(hull):
            extra = float(cost[choice] - cost[before])
            steps.append((item, choice, extra, float(value[choice] - value[before])))
    return sorted(steps, key=lambda step: step[3] / step[2])


def _slope(cost: Floats, value: Floats, before: int, after: int) -> float:
    return float((value[after] - value[before]) / (cost[after] - cost[before]))


def _greedy(tables: Sequence[tuple[Floats, Floats]], limit: float) -> tuple[list[int], float]:
    """A good assignment: all steps, best first, that fit and whose item took the one before."""
    picks = [0] * len(tables)
    is_stuck = [False] * len(tables)
    cost = sum(float(item[0]) for item, _ in tables)
    for item, choice, extra, _ in _steps(tables):
        if not is_stuck[item] and cost + extra <= limit:
            picks[item] = choice
            cost += extra
        else:
            is_stuck[item] = True
    return picks, sum(float(value[pick]) for (_, value), pick in zip(tables, picks, strict=True))


def _undominated(cost: Floats, value: Floats) -> Ints:
    """Places that no other beats in both, by rising cost; the first of equals."""
    order = np.lexsort((value, cost))
    least = np.minimum.accumulate(value[order])
    is_better = np.ones(len(order), bool)
    is_better[1:] = value[order][1:] < least[:-1]
    return np.asarray(order[is_better])
