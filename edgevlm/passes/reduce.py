"""Take visual tokens away: a published method at a budget, or stages composed in the recipe.

    - reduce: {method: visionzip, keep: 0.25}
    - reduce:
        stages:
          - {at: projector, keep: 64, select: spread}
    - reduce: {positions: {v2pe: {step: 0.25}}}

`keep` is the average of visual tokens over the layers of the decoder, as a share or a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from edgevlm.document import Complaint, show, suggest
from edgevlm.errors import PassError
from edgevlm.passes.base import Change, Context, Foresight, Pass
from edgevlm.reduce.catalogue import load_method, method_names
from edgevlm.reduce.fusion import FusionOptions
from edgevlm.reduce.options import StageOptions
from edgevlm.reduce.positions import PositionOptions, blocks, image_section
from edgevlm.reduce.remembering import RememberOptions
from edgevlm.reduce.solve import Problem, solve

if TYPE_CHECKING:
    from edgevlm.model.spec import DecoderSpec, VlmSpec
    from edgevlm.model.vlm import Vlm
    from edgevlm.reduce.plan import Stage


def _budget(value: object) -> int | float:
    """A share up to 1, or a number of tokens."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Complaint(f"keep must be a share or a number of tokens, got {show(value)}")
    if isinstance(value, float) and not 0 < value <= 1:
        raise Complaint(
            f"a share of tokens must be above 0 and at most 1, got {show(value)}",
            hint="write a whole number of tokens without a point",
        )
    if isinstance(value, int) and value < 1:
        raise Complaint(f"keep must be at least one token, got {show(value)}")
    return value


Budget = Annotated[
    int | float,
    PlainValidator(_budget),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            ]
        }
    ),
]


class Reduce(Pass):
    """Fewer visual tokens: a method at a budget, or stages."""

    name: ClassVar[str] = "reduce"

    method: str | None = Field(None, description="A published method.")
    keep: Budget | None = Field(
        None,
        description="Visual tokens on average over the decoder's layers, or rows of a picture that "
        "the cache keeps where a bottleneck hides the tokens: a share, or a number.",
    )
    stages: tuple[StageOptions, ...] = Field(
        (), description="The stages themselves, in the order in which tokens pass them."
    )
    positions: PositionOptions | None = Field(
        None,
        description="Where visual tokens stand; absent: as the method says, else they count by "
        "one, or stand where they stood.",
    )
    fusion: FusionOptions | None = Field(
        None,
        description="What text sees of all visual tokens before the decoder; absent: as the method "
        "says, else nothing.",
    )
    remember: RememberOptions | None = Field(
        None,
        description="What visual tokens look at again within the decoder; absent: as the method "
        "says, else nothing.",
    )
    weights: str | None = Field(
        None,
        min_length=1,
        description="A safetensors file with what learned pieces have learned, relative to the "
        "recipe; absent: what training begins with.",
    )
    pictures: int = Field(
        2,
        ge=1,
        le=8,
        description="Pictures (or tiles) of one prompt, at most, where graphs have fixed shapes.",
    )

    @model_validator(mode="before")
    @classmethod
    def _names_one_thing(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        given = [key for key in ("method", "stages") if data.get(key)]
        if len(given) > 1 or not (given or data.get("positions") or data.get("remember")):
            raise Complaint(
                "a reduction has either a method or stages",
                hint=f"write method: {method_names()[0]}, or stages",
            )
        if not given and data.get("fusion") is not None:
            raise Complaint(
                "text is fused with what stages leave, and there are none",
                hint="name a method or stages, or remove fusion",
                key="fusion",
            )
        if not given and data.get("keep") is not None:
            raise Complaint(
                "keep is a budget of stages, and there are none",
                hint="remove keep, or name a method",
                key="keep",
            )
        method = data.get("method")
        if isinstance(method, str) and method not in method_names():
            hint = suggest(method, method_names())
            raise Complaint(f"unknown method {method!r}", hint=hint, key="method")
        return data

    @property
    def files(self) -> tuple[str, ...]:
        """The weights."""
        return () if self.weights is None else (self.weights,)

    @property
    def asked_stages(self) -> tuple[StageOptions, ...]:
        """The stages of the method, or those of the recipe."""
        return self.stages if self.method is None else load_method(self.method).stages

    @property
    def asked_positions(self) -> PositionOptions | None:
        """The policy of the recipe, or that of the method."""
        if self.positions is not None or self.method is None:
            return self.positions
        return load_method(self.method).positions

    @property
    def asked_fusion(self) -> FusionOptions | None:
        """That of the recipe, or of the method."""
        if self.fusion is not None or self.method is None:
            return self.fusion
        return load_method(self.method).fusion

    @property
    def asked_remember(self) -> RememberOptions | None:
        """That of the recipe, or of the method."""
        if self.remember is not None or self.method is None:
            return self.remember
        return load_method(self.method).remember

    def foresee(self, spec: VlmSpec, context: Context) -> Foresight:
        """Every stage sized, and what becomes of what it asks."""
        from edgevlm.model.learned import check_weights
        from edgevlm.reduce.check import decisions_of, problems_of
        from edgevlm.reduce.fusion import check_fusion
        from edgevlm.reduce.lacking import needs_dense
        from edgevlm.reduce.learned import check_learned, untrained
        from edgevlm.reduce.remembering import check_remember
        from edgevlm.reduce.resolution import reduced

        if spec.reduction is not None:
            raise PassError(
                "visual tokens are taken away already",
                name=self.name,
                hint="write the stages of both into one reduce",
            )
        if spec.is_quantized:
            raise PassError(
                "the model is quantized already, on activations that would no longer come",
                name=self.name,
                hint="put reduce before quantize",
            )
        problem = Problem(
            spec=spec,
            stages=self.asked_stages,
            budget=self.keep,
            method=self.method,
            dense=needs_dense(context),
            pictures=self.pictures,
            positions=self.asked_positions,
            fusion=self.asked_fusion,
            remember=self.asked_remember,
        )
        try:
            problems_of(problem)
            after = reduced(spec, solve(problem))
            after = replace(after, decoder=_decoder_of(after))
            after = replace(after, image=image_section(after))
            check_learned(after)
            if self.asked_fusion is not None:
                check_fusion(after)
            if self.asked_remember is not None:
                check_remember(after)
            if self.weights is not None:
                check_weights(after, context.folder / self.weights)
        except Complaint as complaint:
            raise PassError(complaint.message, name=self.name, hint=complaint.hint) from None
        return Foresight(
            spec=after,
            effect=effect_of(spec, after),
            decisions=(
                *decisions_of(problem, after, context),
                *untrained(problem, self.weights),
            ),
        )

    def apply(self, model: Vlm, context: Context) -> Change:
        """Put the stages at their sites."""
        from edgevlm.model.learned import teach
        from edgevlm.reduce.resolution import fit_positions

        before = model.spec
        after = self.foresee(before, context).spec
        fit_positions(model, after)
        model.stage(after)
        if self.weights is not None:
            teach(model, context.folder / self.weights)
        assert after.reduction is not None
        _, stages = after.reduction.stages[0]
        sites = [site_of(stage) for stage in stages]
        if after.reduction.positions is not None or after.reduction.remember is not None:
            sites.append("decoder")
        return Change(
            sites=tuple(dict.fromkeys(sites)),
            measures={
                "visual_tokens_before": before.dense_tokens(before.vision.grids[0]),
                "visual_tokens": _average(after),
            },
        )


def site_of(stage: Stage) -> str:
    """The name of the place of a stage."""
    if stage.at in ("decoder", "encoder.layers"):
        part = "decoder" if stage.at == "decoder" else "vision"
        return f"{part}.layers.{stage.layer}"
    if stage.at == "input" and stage.transform is not None:
        return "vision.embed.position"
    return "projector" if stage.at == "projector" else "vision"


def effect_of(before: VlmSpec, after: VlmSpec) -> str:
    """How many tokens are left, in a line."""
    dense = before.dense_tokens(before.vision.grids[0])
    if after.hidden:
        return f"{dense} visual tokens leave {_average(after):.4g} rows in the cache"
    return f"{dense} visual tokens become {_average(after):.4g} on average"


def _average(spec: VlmSpec) -> float:
    from edgevlm.reduce.plan import average_tokens

    return average_tokens(spec.segments)


def _decoder_of(spec: VlmSpec) -> DecoderSpec:
    """The decoder, whose frequencies turn with as many axes as tokens have places."""
    assert spec.reduction is not None
    decoder, policy = spec.decoder, spec.reduction.positions
    if policy is None or policy.ppe is None:
        return decoder
    rope = decoder.rope
    sections = blocks(rope.sections, len(rope.inv_freq), policy.ppe.axes)
    return replace(decoder, rope=replace(rope, sections=sections))
