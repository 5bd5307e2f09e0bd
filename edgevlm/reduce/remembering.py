"""Visual tokens that look at their part of the picture again, between layers of the decoder.

Vision Remember (arXiv 2506.03928) gives tokens that were compressed back what compression lost: a
token that stands for a window of patches attends to the encoder's features of these patches, from
several of its layers, and adds what it finds, times a learned gate. The published layers and gates
are not known; here they are options, and gates begin at zero, where nothing is added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from edgevlm.document import Complaint, Options

if TYPE_CHECKING:
    from edgevlm.model.spec import VlmSpec
    from edgevlm.reduce.plan import Grid

__all__ = ["RememberOptions", "check_remember", "window"]


class RememberOptions(Options):
    """Which features are looked at, and where."""

    depths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.54, 0.75, 0.96),
        min_length=1,
        description="Shares of the encoder's layers, whose outputs are the features.",
    )
    step: int = Field(4, ge=1, description="Before every so many layers of the decoder.")
    heads: int = Field(8, ge=1)

    def encoder_layers(self, num_layers: int) -> tuple[int, ...]:
        """Numbers of the layers whose outputs are looked at: 1 is the first's."""
        found = (max(1, round(depth * num_layers)) for depth in self.depths)
        return tuple(dict.fromkeys(found))

    def decoder_layers(self, num_layers: int) -> range:
        """Layers of the decoder that tokens look again before."""
        return range(0, num_layers, self.step)


def window(spec: VlmSpec, grid: Grid) -> tuple[Grid, Grid]:
    """The grid in which visual tokens lie, and the window of patches that each stands for."""
    assert spec.reduction is not None
    stages = spec.reduction.before(grid)
    tokens = spec.token_grid(grid)
    if stages:
        tokens = stages[-1].grid_out
        side = spec.projector.merge
        if tokens is not None and stages[-1].at != "projector" and side > 1:
            tokens = tokens[0] // side, tokens[1] // side
    if tokens is None:
        raise Complaint(
            "tokens look again at their own windows of patches, and they lie on no grid",
            hint="pool them: transform: elastic",
        )
    if grid[0] % tokens[0] or grid[1] % tokens[1]:
        raise Complaint(
            f"{grid[0]} x {grid[1]} patches have no even windows for {tokens[0]} x {tokens[1]} "
            "tokens",
            hint="keep a number of tokens whose sides divide those of the grid",
        )
    return tokens, (grid[0] // tokens[0], grid[1] // tokens[1])


def check_remember(spec: VlmSpec) -> None:
    """Raise Complaint where tokens cannot look at the picture again."""
    reduction = spec.reduction
    assert reduction is not None
    assert reduction.remember is not None
    if spec.vision.position == "rotary":
        raise Complaint(
            "patches of this encoder come in the order of its windows, and not row by row",
            hint="remove remember",
        )
    if len(spec.vision.grids) > 1:
        raise Complaint(
            f"pictures come in {len(spec.vision.grids)} grids, and tokens look again in one",
            hint="name one grid in image.grids",
        )
    for site in ("input", "encoder.layers"):
        if reduction.of(spec.vision.grids[0], site):
            raise Complaint(
                f"tokens look again at all patches, of which a stage at {site} took some",
                hint="put the stage at encoder or projector",
            )
    if reduction.cuts or reduction.skips or reduction.hidden:
        raise Complaint(
            "tokens look again in layers that see all of them, and a stage in the decoder takes "
            "some",
            hint="put the stages before the decoder",
        )
    if any("registers" in stage.needs for stage in reduction.before(spec.vision.grids[0])):
        raise Complaint(
            "tokens look again at their own windows of patches, and registers have none",
            hint="pool them: transform: elastic",
        )
    if spec.decoder.width % reduction.remember.heads:
        raise Complaint(
            f"{reduction.remember.heads} heads do not share rows of {spec.decoder.width} numbers "
            "evenly",
            hint=f"choose a number of heads that divides {spec.decoder.width}",
        )
    window(spec, spec.vision.grids[0])
