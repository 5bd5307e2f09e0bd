"""Move outliers of activations into the weights that read them, before both are rounded.

    - smooth: {alpha: 0.5, components: [vision, decoder]}
    - quantize: {vision: w8a8, decoder: w8a8}

This is SmoothQuant (Xiao et al., 2023), and for inputs that its paper leaves alone too: those that
values and gated MLPs make. The model stays what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from edgevlm.passes.base import Change, Context, Foresight, Pass
from edgevlm.quant.absorb import Absorber, scalable, touched

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.model.spec import VlmSpec
    from edgevlm.model.vlm import Vlm
    from edgevlm.quant.equalize import Scaling
    from edgevlm.quant.ranges import ActivationRange


class Smooth(Pass):
    """Inputs scaled so that they and the weights that read them are alike in range."""

    name: ClassVar[str] = "smooth"
    lossless: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True

    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="How much of the range goes into the weights: none, or all of it.",
    )
    components: tuple[Literal["vision", "projector", "decoder", "head"], ...] = Field(
        ("vision", "projector", "decoder", "head"),
        min_length=1,
        description="Parts of the model whose inputs are scaled.",
    )

    def foresee(self, spec: VlmSpec, context: Context) -> Foresight:
        """Shapes and outputs stay as they are."""
        found, skipped = scalable(self.name, spec, self.components)
        effect = f"{len(found)} inputs scaled, {len(skipped)} left; outputs do not change"
        return Foresight(spec=spec, effect=effect)

    def apply(self, model: Vlm, context: Context) -> Change:
        """Find the ranges of all inputs, and fold their scales."""
        from edgevlm.quant.equalize import equalize

        found, skipped = scalable(self.name, model.spec, self.components)
        measures = equalize(model, found, _Ranges(self.alpha), context, name=self.name)
        return Change(sites=touched(found), skipped=skipped, measures=measures)


@dataclass(frozen=True, slots=True)
class _Ranges:
    """SmoothQuant's scales; `spread` is what a mean channel lacks of the largest, as a ratio."""

    alpha: float

    def observer(self, site: str, columns: int) -> ActivationRange:
        """The largest number of every channel."""
        from edgevlm.quant.ranges import ActivationRange

        return ActivationRange(site, name=Smooth.name)

    def scaling(
        self, absorber: Absorber, weights: Sequence[Tensor], seen: ActivationRange
    ) -> Scaling:
        """The scale of an input; channels that are read several times have their largest range."""
        import torch

        from edgevlm.quant.equalize import Scaling
        from edgevlm.quant.smooth import smooth_scales

        inputs_K = absorber.most(seen.channel_absmax)
        weights_K = absorber.most(torch.cat(list(weights)).abs().amax(dim=0))
        scale_K = smooth_scales(inputs_K, [weights_K[None]], alpha=self.alpha)
        return Scaling(
            scale=scale_K,
            measures={
                "spread_before": _spread(seen.channel_absmax),
                "spread_after": _spread(seen.channel_absmax / scale_K),
            },
        )


def _spread(absmax_K: Tensor) -> float:
    """How many times the mean channel's range the largest one is."""
    mean = float(absmax_K.mean())
    return float(absmax_K.max()) / mean if mean else 1.0
