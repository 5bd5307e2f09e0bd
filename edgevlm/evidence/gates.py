"""Gates: how far a rung may be from its parent before a compile fails.

The bounds of a recipe hold for every rung. Our eager model answers to a tighter one, because it
runs the same torch kernels as the reference. Errors are in units of max(1, std of the reference).
A token that differs where the reference's two best logits are further apart than a tie is never
allowed between float32 forms of one model, whatever a recipe says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgevlm.recipe import FLOORS, EvidenceOptions

EAGER_MAX_ERROR = 1e-4

ROUNDED = {"cosine": 0.999, "kl": 1e-3, "argmax_agreement": 0.98, "token_agreement": 0.9}
"""Bounds between a quantized model and its graphs: the same numbers, rounded a few times apart."""

CHOICES = frozenset({"argmax_agreement", "token_agreement"})
"""Figures about the tokens that are best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """How far a figure may go; `reason` says why that is further than usual."""

    value: float
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A figure held against its bound, and the bound's reason."""

    name: str
    measured: float
    bound: float
    reason: str | None = None

    @property
    def is_floor(self) -> bool:
        """Whether the figure may not fall below the bound, rather than rise above it."""
        return self.name.split(".")[-1] in FLOORS

    @property
    def passed(self) -> bool:
        """Whether the figure holds; NaN does not."""
        return self.measured >= self.bound if self.is_floor else self.measured <= self.bound


def limits(
    options: EvidenceOptions,
    *,
    reduced: bool = False,
    quantized: bool = False,
    drawn: bool = False,
) -> dict[str, dict[str, Bound]]:
    """The bounds of each kind of rung, from a recipe's.

    Where activations are rounded, two kernels that add in another order round a number that lies
    between two steps to different ones. Graphs of a `quantized` model are held to what that makes.

    What a `reduced` model loses of its accuracy is bounded; its logits, of other prompts, are not.

    What a quantized model of `drawn` weights loses is measured and not judged: it has no answers to
    lose, and its logits lie closer together than those of any trained model, closer than what two
    kernels make of them. So its graphs are held to its logits, and nothing to the tokens chosen.
    """
    reasons = options.loosened
    shared = {
        name: Bound(value=value, reason=reasons.get(name))
        for name, value in options.gates.model_dump().items()
    }
    shared["flips"] = Bound(value=0.0)
    eager = Bound(value=min(options.gates.max_error, EAGER_MAX_ERROR))
    model = {**shared, "max_error": eager}
    lossy = {name: Bound(value=value) for name, value in options.quantized.model_dump().items()}
    fewer: dict[str, Bound] = {}
    if reduced:
        # Answers are scored against those of the reference: what is allowed adds up.
        drop = options.reduced.accuracy_drop
        fewer = {} if drawn else {"accuracy_drop": Bound(value=drop)}
        shared["accuracy_drop"] = Bound(value=drop + options.gates.accuracy_drop)
        lossy["accuracy_drop"] = Bound(value=drop + options.quantized.accuracy_drop)
    if quantized:
        graph = {name: Bound(value=value) for name, value in ROUNDED.items()}
        runtime = {
            "token_agreement": graph["token_agreement"],
            "accuracy_drop": lossy["accuracy_drop"],
        }
        if drawn:
            graph = {name: bound for name, bound in graph.items() if name not in CHOICES}
            lossy, runtime = {}, {}
        return {
            "model": model,
            "reduced": fewer,
            "quantized": lossy,
            "graph": graph,
            "runtime": runtime,
        }
    return {
        "model": model,
        "reduced": fewer,
        "graph": shared,
        "runtime": {name: shared[name] for name in ("token_agreement", "accuracy_drop", "flips")},
    }


def parting(bounds: Mapping[str, Bound], lost: Mapping[str, float]) -> dict[str, Bound]:
    """Bounds of graphs whose model rounds in many layers, by what rounding `lost` there.

    One number that rounds to the other side moves the numbers behind it, of which more round to the
    other side: two runs may end as far apart as rounding itself is from none, and no further. So a
    figure such as `vision.cosine` may lie twice as far from perfect as the model's own does.
    """
    found = dict(bounds)
    for name, value in lost.items():
        bound = bounds.get(name.split(".")[-1])
        if bound is None:
            continue
        if name.split(".")[-1] in FLOORS:
            found[name] = replace(bound, value=min(bound.value, 1.0 - 2.0 * (1.0 - value)))
        else:
            found[name] = replace(bound, value=max(bound.value, 2.0 * value))
    return found


def judge(measured: Mapping[str, float], bounds: Mapping[str, Bound]) -> tuple[Gate, ...]:
    """Hold figures such as `decoder.max_error` against their bounds, else that of `max_error`."""
    gates = []
    for name, value in measured.items():
        bound = bounds.get(name, bounds.get(name.split(".")[-1]))
        if bound is not None:
            gates.append(Gate(name=name, measured=value, bound=bound.value, reason=bound.reason))
    return tuple(gates)
