"""Decisions: what became of each thing that a recipe asks for, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgevlm.errors import DeviceError

__all__ = ["Decision", "Outcome", "refuse"]

Outcome = Literal["applied", "degraded", "refused"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What became of a wish: what was asked, whether it is done, why, and what that means."""

    asked: str
    outcome: Outcome
    reason: str
    effect: str


def refuse(decisions: Sequence[Decision]) -> None:
    """Raise DeviceError where something that was asked for is refused."""
    refused = [decision for decision in decisions if decision.outcome == "refused"]
    if refused:
        first, more = refused[0], len(refused) - 1
        raise DeviceError(
            f"{first.asked} is refused: {first.reason}" + (f" (and {more} more)" if more else ""),
            hint=first.effect,
        )
