"""What a pass is: one step of a recipe that rewrites the model.

A pass is its options: a frozen pydantic model whose class name in snake case is its key in the
recipe. `foresee` says from the spec alone what the model will be after it; `check` refuses a model
it does not apply to; `apply` rewrites the model in place and reports a `Change`. A pass that
matches nothing is an error, since the user asked for it by name. `lossless` is a promise that
`run_passes` verifies on a probe.

Passes hold options and import their maths inside `apply`, so that reading a recipe needs no torch.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgevlm.document import Options
from edgevlm.errors import PassError
from edgevlm.progress import Progress, Silent

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.decisions import Decision
    from edgevlm.device import Device
    from edgevlm.model.spec import VlmSpec
    from edgevlm.model.vlm import Vlm
    from edgevlm.quant.calibrate import CalibrationCase

logger = logging.getLogger(__name__)

# Folding in float32 reorders roundings: the same bound as between us and the reference model.
LOSSLESS_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What a pass may look at besides the model.

    `targets` are the forms that it is compiled to. `probe` runs the model on a sample and returns
    its logits; without one, the promise of a lossless pass is not verified. `calibration` draws
    the recipe's calibration samples for a model of a spec, which says how many tokens a picture
    has; `samples_key` is their hash, and a plan has none. `folder` is the recipe's, which files
    that a pass names lie in. `work` is a folder where a long pass keeps what it has done so far.
    """

    device: Device
    targets: tuple[str, ...] = ()
    seed: int = 0
    probe: Callable[[Vlm], Tensor] | None = None
    calibration: Callable[[VlmSpec], Sequence[CalibrationCase]] | None = None
    samples_key: str = ""
    progress: Progress = field(default_factory=Silent)
    folder: Path = Path()
    work: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What one pass did.

    `sites` were touched, `skipped` were looked at and left, each with the reason; `measures` are
    numbers worth knowing (`visual_tokens`, `weight_mib`). `schemes` has what each quantized site
    was given, as plain data.
    """

    sites: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    schemes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Foresight:
    """What `plan` can say of a pass without weights: the spec after it, and what it will touch.

    `decisions` are about single wishes of the pass, where it has several.
    """

    spec: VlmSpec
    effect: str
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """A pass, and the change it made."""

    step: Pass
    change: Change


class Pass(Options, ABC):
    """One rewrite of a model; the fields of a subclass are its options."""

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False

    @property
    def files(self) -> tuple[str, ...]:
        """Files that it reads, relative to the recipe."""
        return ()

    @abstractmethod
    def foresee(self, spec: VlmSpec, context: Context) -> Foresight:
        """Say what the model will be, or raise PassError where the spec alone shows it cannot."""

    def reshape(self, spec: VlmSpec, change: Change, context: Context) -> VlmSpec:
        """The spec of a model that this pass has changed."""
        return self.foresee(spec, context).spec

    def check(self, model: Vlm, context: Context) -> None:
        """Raise PassError if the pass does not apply. Must not modify the model."""

    @abstractmethod
    def apply(self, model: Vlm, context: Context) -> Change:
        """Rewrite the model in place and report what changed."""


def run_pass(step: Pass, model: Vlm, context: Context) -> Change:
    """Run one pass; refuse one that matched nothing, or that broke its promise."""
    step.check(model, context)
    before = context.probe(model) if step.lossless and context.probe is not None else None
    change = step.apply(model, context)
    if not change.sites:
        reasons = sorted(set(change.skipped.values()))
        raise PassError(
            "matched nothing" + (f" ({'; '.join(reasons)})" if reasons else ""),
            name=step.name,
            hint="remove the pass from the recipe",
        )
    if before is not None and context.probe is not None:
        verify_lossless(step, before, context.probe(model))
    logger.info("%s: %d sites, %d skipped", step.name, len(change.sites), len(change.skipped))
    return change


def run_passes(steps: Sequence[Pass], model: Vlm, context: Context) -> tuple[Applied, ...]:
    """Run the passes in the recipe's order."""
    return tuple(Applied(step=step, change=run_pass(step, model, context)) for step in steps)


def verify_lossless(step: Pass, before: Tensor, after: Tensor) -> None:
    """Raise PassError where a lossless pass moved the logits by more than rounding."""
    allowed = LOSSLESS_TOLERANCE * max(1.0, float(before.std()))
    error = float((after - before).abs().max())
    # A NaN compares false with everything, and must not pass for small.
    if not error <= allowed:
        raise PassError(
            f"promised the same logits, and moved one by {error:.2g}, allowed {allowed:.2g}",
            name=step.name,
        )
