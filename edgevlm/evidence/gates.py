"""Gates: how far a rung may be from its parent before a compile fails.

The bounds of a recipe hold for every rung. Our eager model answers to a tighter one, because it
runs the same torch kernels as the reference. Errors are in units of max(1, std of the reference).
A token that differs where the reference's two best logits are further apart than a tie is never
allowed between float32 forms of one model, whatever a recipe says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgevlm.recipe import Gates

EAGER_MAX_ERROR = 1e-4
FLOORS = frozenset({"cosine", "argmax_agreement", "token_agreement"})
"""Gates whose bound is the least allowed; that of the others is the most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A bound and the figure held against it; `reason` says why the bound is looser than usual."""

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


def limits(gates: Gates) -> dict[str, dict[str, float]]:
    """The bounds of each kind of rung, from a recipe's."""
    shared = {**gates.model_dump(), "flips": 0.0}
    return {
        "model": {**shared, "max_error": min(gates.max_error, EAGER_MAX_ERROR)},
        "graph": shared,
        "runtime": {name: shared[name] for name in ("token_agreement", "accuracy_drop", "flips")},
    }


def judge(
    measured: Mapping[str, float], bounds: Mapping[str, float], loosened: Mapping[str, str]
) -> tuple[Gate, ...]:
    """Hold figures such as `decoder.max_error` against the bounds they have."""
    return tuple(
        Gate(
            name=name,
            measured=value,
            bound=bounds[name.split(".")[-1]],
            reason=loosened.get(name.split(".")[-1]),
        )
        for name, value in measured.items()
        if name.split(".")[-1] in bounds
    )
