"""Gates: how far a rung may be from its parent before a compile fails.

The limits below are for float32 forms of one model, where only the order of additions differs.
Errors are in units of max(1, std of the reference tensor). A recipe may tighten a limit; to loosen
one it has to give a reason, which the manifest repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_LIMITS: Mapping[str, float] = {
    # Our eager model against the Hugging Face class: the same torch kernels in another order.
    "ours.vision": 1e-4,
    "ours.projector": 1e-4,
    "ours.decoder": 1e-4,
    "ours.kl": 1e-6,
    "ours.flips": 0.0,
    # A graph against our eager model: other kernels, other blocking, fused norms and softmax.
    "graph.vision": 5e-4,
    "graph.projector": 5e-4,
    "graph.decoder": 5e-4,
    "graph.kl": 1e-6,
    "graph.flips": 0.0,
    # The runtime's own greedy answers against the Hugging Face model's.
    "runtime.flips": 0.0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One limit: `measured` must not be above `limit`."""

    name: str
    measured: float
    limit: float
    reason: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the figure holds; NaN does not."""
        return self.measured <= self.limit


def judge(
    kind: str,
    measured: Mapping[str, float],
    limits: Mapping[str, float],
    reasons: Mapping[str, str],
) -> tuple[Gate, ...]:
    """Hold figures (`vision`, `kl`, ...) of a rung of this kind against the limits they have."""
    return tuple(
        Gate(
            name=f"{kind}.{part}",
            measured=value,
            limit=limits[f"{kind}.{part}"],
            reason=reasons.get(f"{kind}.{part}"),
        )
        for part, value in measured.items()
        if f"{kind}.{part}" in limits
    )
