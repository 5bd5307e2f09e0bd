"""Scale inputs down and columns up before rounding, where that makes the rounding harm less (AWQ).

    - awq: {scheme: w4a16, group_size: 32, components: [decoder]}
    - quantize: {decoder: {scheme: w4a16, group_size: 32}}

The model stays what it is; `quantize` then rounds other weights. The search is for weights rounded
to nearest on the grid that is asked for here, which should be the one that `quantize` is asked for.
Where nothing before an input can take the division, the input is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from edgevlm.document import Complaint
from edgevlm.passes.base import Change, Context, Foresight, Pass
from edgevlm.quant.absorb import Absorber, scalable, touched
from edgevlm.quant.options import SchemeOptions

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.model.spec import VlmSpec
    from edgevlm.model.vlm import Vlm
    from edgevlm.quant.equalize import Scaling
    from edgevlm.quant.gptq import Hessian
    from edgevlm.quant.ranges import RangeMethod
    from edgevlm.quant.spec import WeightQuant


class Awq(Pass):
    """Inputs scaled for the rounding of the weights that read them."""

    name: ClassVar[str] = "awq"
    lossless: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True

    scheme: Literal["w4a16", "w4a8", "w8a16", "w8a8"] = Field(
        description="The scheme that the weights will have."
    )
    group_size: int | None = Field(
        None, ge=8, le=1024, description="Weights of a row that share a scale; absent: see device."
    )
    per_channel: bool = Field(False, description="A whole row shares a scale.")
    symmetric: bool = Field(True, description="Weights without zero points.")
    ranges: Literal["minmax", "percentile", "mse"] = Field(
        "minmax", description="How the ranges of weights are found."
    )
    components: tuple[Literal["vision", "projector", "decoder", "head"], ...] = Field(
        ("vision", "projector", "decoder", "head"),
        min_length=1,
        description="Parts of the model whose inputs are scaled.",
    )

    @model_validator(mode="after")
    def _hangs_together(self) -> Awq:
        if self.per_channel and self.group_size is not None:
            raise Complaint(
                f"group_size {self.group_size} and per_channel exclude each other",
                hint="remove one of them",
                key="per_channel",
            )
        return self

    def foresee(self, spec: VlmSpec, context: Context) -> Foresight:
        """Shapes and outputs stay as they are."""
        found, skipped = scalable(self.name, spec, self.components)
        effect = f"{len(found)} inputs scaled, {len(skipped)} left; outputs do not change"
        return Foresight(spec=spec, effect=effect)

    def apply(self, model: Vlm, context: Context) -> Change:
        """Search the scales of all inputs, and fold them."""
        from edgevlm.quant.equalize import equalize

        found, skipped = scalable(self.name, model.spec, self.components)
        search = _Search(self._weights(context), self.ranges)
        measures = equalize(model, found, search, context, name=self.name)
        return Change(sites=touched(found), skipped=skipped, measures=measures)

    def _weights(self, context: Context) -> WeightQuant:
        """The grid that the weights will be rounded to."""
        from edgevlm.quant.assign import scheme_of

        wish = SchemeOptions(
            scheme=self.scheme,
            group_size=self.group_size,
            per_channel=self.per_channel,
            symmetric=self.symmetric,
        )
        return scheme_of(wish, context.device, context.targets).weights


@dataclass(frozen=True, slots=True)
class _Search:
    """AWQ's scales for one grid; `error` is what they leave of the error of rounding to nearest."""

    grid: WeightQuant
    ranges: RangeMethod

    def observer(self, site: str, columns: int) -> Hessian:
        """Products of columns, and their mean sizes."""
        from edgevlm.quant.gptq import Hessian

        return Hessian(columns, site=site, name=Awq.name)

    def scaling(self, absorber: Absorber, weights: Sequence[Tensor], seen: Hessian) -> Scaling:
        """The best scale of an input."""
        from edgevlm.quant.awq import awq_scale
        from edgevlm.quant.equalize import Scaling

        found = awq_scale(
            weights,
            seen,
            bits=self.grid.bits,
            group_size=self.grid.group_size,
            symmetric=self.grid.symmetric,
            ranges=self.ranges,
            weighs=False,
            pooled=absorber.mean,
        )
        left = found.objective / found.rtn_objective if found.rtn_objective else 1.0
        return Scaling(scale=found.scale, measures={"error": left})
