"""What a model, a device and a target make of stages: applied, degraded or refused, with reasons.

What cannot be done at all is a Complaint, which names the stage and the remedy; what is done in
another way than asked is a decision that says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgevlm.decisions import Decision
from edgevlm.document import Complaint
from edgevlm.reduce.bottlenecks.needs import check_bottleneck
from edgevlm.reduce.lacking import refusal, without_sorting
from edgevlm.reduce.merges.registers import check_registers
from edgevlm.reduce.options import StageOptions
from edgevlm.reduce.positions import blocks, span
from edgevlm.reduce.resolution import check_resolution
from edgevlm.reduce.skipping import check_alone, possible_layers
from edgevlm.reduce.solve import Problem, layer_of

if TYPE_CHECKING:
    from edgevlm.model.spec import VlmSpec
    from edgevlm.passes.base import Context
    from edgevlm.reduce.plan import Stage

MIXERS = ("attention",)


def problems_of(problem: Problem) -> None:
    """Raise Complaint for the first stage that this model has no place for."""
    spec, stages = problem.spec, problem.stages
    is_whole, is_packed = True, False
    check_alone(stages)
    for number, stage in enumerate(stages, 1):
        try:
            _check_site(spec, stage)
            _check_counts(stage)
            _check_needs(spec, stage, is_whole=is_whole)
            if "registers" in stage.needs:
                check_registers(spec, stage, number)
            if stage.at == "decoder":
                _check_place(spec, stage, is_packed=is_packed)
                _check_heads(spec, stage)
                is_packed = stage.place == "repack"
        except Complaint as complaint:
            message = f"stage {number}: {complaint.message}"
            raise Complaint(message, hint=complaint.hint) from None
        # Patches that never enter the encoder are missing in every layer alike.
        is_whole = is_whole and stage.at == "input"
        _check_encoded(stages[:number], stages[number:])
    _check_positions(problem)
    check_bottleneck(problem)


def _check_positions(problem: Problem) -> None:
    """Raise Complaint where a policy and the stages contradict each other."""
    policy, stages = problem.positions, problem.stages
    before = [stage for stage in stages if stage.at != "decoder"]
    giver = None if policy is None else policy.name
    if policy is None and before and before[-1].place == "keep":
        giver = f"place: keep of stage {len(before)}"
    for number, stage in enumerate(stages, 1):
        if stage.at == "decoder" and stage.place == "repack" and giver is not None:
            raise Complaint(
                f"stage {number}: positions are counted anew in the decoder, which takes those "
                f"that count by one, and {giver} gives others",
                hint="write place: keep, or choose a method whose stages keep positions",
            )
    if policy is None:
        return
    if policy.v2pe is not None and problem.spec.decoder.rope.sections:
        raise Complaint(
            "v2pe counts along one axis, and visual tokens of this model stand on three",
            hint="choose share or ppe, or lower the resolution",
        )
    for number, stage in enumerate(stages, 1):
        if stage.at != "decoder" and stage.place == "keep" and policy.v2pe is None:
            raise Complaint(
                f"stage {number}: tokens cannot keep their positions and have those of "
                f"{policy.name}",
                hint="remove place",
            )
        if policy.ppe is not None and stage.transform is not None and stage.at != "input":
            raise Complaint(
                f"stage {number}: {stage.transform.name!r} mixes tokens of a whole grid, which "
                "have no places of their own for ppe",
                hint="merge tokens instead",
            )
    if policy.ppe is not None:
        if not any(stage.merge is not None or stage.rest is not None for stage in before):
            raise Complaint(
                "ppe gives merged tokens the places of their members, and no stage merges any",
                hint="name a method or a stage that merges, such as merge: bipartite",
            )
        rope = problem.spec.decoder.rope
        blocks(rope.sections, len(rope.inv_freq), policy.ppe.axes)


def _check_site(spec: VlmSpec, stage: StageOptions) -> None:
    """A stage needs tokens that can be taken one by one where it stands."""
    if stage.at == "decoder":
        num_layers = len(spec.decoder.layers)
        narrow: Sequence[int] = range(layer_of(stage, num_layers), num_layers)
        if stage.skip is not None:
            # The layers between those that tokens skip see all rows.
            narrow = possible_layers(stage, num_layers)
        for index in narrow:
            mixer = spec.decoder.layers[index].mixer
            if mixer not in MIXERS:
                raise Complaint(
                    f"decoder.layers.{index} is {mixer!r}, whose state stands for rows in "
                    "their order",
                    hint="put the stage at projector, before the decoder",
                )
        if len(spec.vision.grids) > 1:
            raise Complaint(
                f"pictures come in {len(spec.vision.grids)} grids, and a cut in the decoder takes "
                "one number of tokens",
                hint="name one grid in image.grids, or put the stage at projector",
            )
    if stage.at == "input":
        _check_input(spec, stage)
    merge = spec.projector.merge
    takes_patches = stage.at == "encoder.layers" or (
        stage.at in ("encoder", "input") and stage.transform is None
    )
    if merge > 1 and takes_patches:
        raise Complaint(
            f"the projector joins squares of {merge} x {merge} patches, which are gone when "
            f"patches are taken at {stage.at}",
            hint="put the stage at projector",
        )
    if merge > 1 and stage.at == "encoder" and stage.place == "keep":
        raise Complaint(
            f"the projector joins squares of {merge} x {merge} patches, whose positions are not "
            "those of patches",
            hint="remove place, or put the stage at projector",
        )
    if stage.at == "encoder.layers":
        if spec.vision.position == "rotary":
            raise Complaint(
                "patches of this encoder turn with their places in every layer, and merged ones "
                "have none",
                hint="put the stage at projector",
            )
        last = len(spec.vision.layers)
        if spec.vision.feature_layers != (last,):
            raise Complaint(
                f"features of layers {', '.join(map(str, spec.vision.feature_layers))} leave the "
                "encoder, and their patches would no longer be the same",
                hint="put the stage at encoder",
            )
        for grid in spec.vision.grids:
            if spec.patch_tokens(grid) != math.prod(grid):
                raise Complaint(
                    f"{spec.patch_tokens(grid)} rows leave the encoder, which are not its "
                    f"{math.prod(grid)} patches",
                    hint="put the stage at encoder",
                )


def _check_place(spec: VlmSpec, stage: StageOptions, *, is_packed: bool) -> None:
    """Within the decoder positions are kept, or counted anew from there on."""
    if stage.place == "repack":
        if spec.decoder.rope.sections:
            raise Complaint(
                "positions have a row and a column of the grid, and cannot be counted anew within "
                "the decoder",
                hint="write place: keep",
            )
        return
    if is_packed:
        raise Complaint(
            "it keeps positions, which a stage before it has counted anew",
            hint="write place: repack",
        )
    maker = stage.rest or stage.merge
    if maker is not None:
        raise Complaint(
            f"{maker.name!r} makes tokens of others, which have no positions to keep",
            hint="write place: repack",
        )


def _check_heads(spec: VlmSpec, stage: StageOptions) -> None:
    """A score by the best heads of a layer finds as many there."""
    top_heads = getattr(stage.score, "top_heads", None)
    if stage.score is None or not isinstance(top_heads, int):
        return
    layer = layer_of(stage, len(spec.decoder.layers)) - stage.score.looks_back
    num_heads = spec.decoder.layers[layer].attention.num_heads
    if top_heads > num_heads:
        raise Complaint(
            f"it goes by the best {top_heads} heads of {num_heads}",
            hint="write a share of the heads, such as top_heads: 0.5",
        )


def _check_input(spec: VlmSpec, stage: StageOptions) -> None:
    """Before the encoder pictures are made smaller, or the same patches of each are left out."""
    if stage.transform is not None:
        check_resolution(spec)
        if stage.place is not None:
            raise Complaint(
                "a smaller picture has positions of its own",
                hint="remove place",
            )
        return
    height, width = spec.vision.grids[0]
    if spec.projector.merge == 1 and spec.patch_tokens((height, width)) != height * width:
        raise Complaint(
            f"{spec.patch_tokens((height, width))} rows leave an encoder of {height} x {width} "
            "patches, and the one that is no patch cannot be told apart",
            hint="put the stage at encoder",
        )


def _check_encoded(done: Sequence[StageOptions], coming: Sequence[StageOptions]) -> None:
    """The encoder's features are those of the tokens until a stage at the projector took some."""
    if done[-1].at != "projector":
        return
    for number, stage in enumerate(coming, len(done) + 1):
        if "encoded" in stage.needs:
            raise Complaint(
                f"stage {number}: it looks at the encoder's features of every token, and a stage "
                "before it at projector took some",
                hint="put it first, or the other stage at encoder",
            )


def _check_counts(stage: StageOptions) -> None:
    """Graphs have fixed shapes: how many tokens a piece keeps is known before any picture."""
    for piece in stage.pieces:
        if piece.static_class == "D1" and not piece.is_calibrated:
            raise Complaint(
                f"{piece.name!r} keeps a number of tokens that depends on the picture, and no "
                "calibration says how many",
                hint="give it a number, or choose a piece that keeps one",
            )


def _check_needs(spec: VlmSpec, stage: StageOptions, *, is_whole: bool) -> None:
    """What pieces look at must be there."""
    if "class" in stage.needs and not spec.vision.class_token:
        raise Complaint(
            "it scores by the attention of the class token, and this encoder has none",
            hint="add instead: all, which takes what every patch gives",
        )
    rows = {grid: spec.patch_tokens(grid) for grid in spec.vision.grids}
    odd = [(grid, count) for grid, count in rows.items() if count != grid[0] * grid[1]]
    if odd and "attention" in stage.needs and stage.at != "decoder":
        (grid, count) = odd[0]
        raise Complaint(
            f"it looks at attention between patches, and {count} rows leave an encoder of "
            f"{grid[0]} x {grid[1]} patches",
            hint="choose a piece that looks at tokens alone, or a stage in the decoder",
        )
    if "question" in stage.needs and stage.at not in ("projector", "decoder"):
        raise Complaint(
            f"it looks at the question, which is not there at {stage.at}",
            hint="put the stage at projector or in the decoder",
        )
    is_late = stage.at in ("encoder", "projector")
    if is_late and "attention" in stage.needs and not is_whole:
        raise Complaint(
            "it looks at attention over all patches, of which a stage before it took some",
            hint="put it first, or choose a piece that looks at tokens alone",
        )
    asked = {layer for piece in stage.pieces for layer in piece.layers}
    for layer in sorted(asked):
        if layer < -len(spec.vision.layers):
            raise Complaint(
                f"it looks at layer {layer} of an encoder of {len(spec.vision.layers)}",
                hint=f"choose from -{len(spec.vision.layers)} to -1",
            )
        attention = spec.vision.layers[layer].attention
        is_one = any(getattr(piece, "heads", "each") == "one" for piece in stage.pieces)
        if is_one and attention.num_heads != attention.num_kv_heads:
            raise Complaint(
                f"it takes the heads of layer {layer} as one, and {attention.num_heads} heads of "
                f"queries share {attention.num_kv_heads} of keys",
                hint="write heads: each",
            )
        if spec.vision.layers[layer].mixer != "attention":
            full = [
                index - len(spec.vision.layers)
                for index, other in enumerate(spec.vision.layers)
                if other.mixer == "attention"
            ]
            raise Complaint(
                f"it looks at layer {layer} of the encoder, whose patches see their own window",
                hint=f"choose {', '.join(map(str, full))}",
            )


def decisions_of(problem: Problem, after: VlmSpec, context: Context) -> Iterator[Decision]:
    """What became of every stage."""
    assert after.reduction is not None
    yield from without_sorting(problem, context)
    if problem.positions is not None:
        yield Decision(
            asked=f"positions {problem.positions.name}",
            outcome="applied",
            reason="class S3",
            effect=_span_of(after),
        )
    _, stages = after.reduction.stages[0]
    for number, options in enumerate(problem.stages, 1):
        parts = [stage for stage in stages if stage.number == number]
        first, last = parts[0], parts[-1]
        what = "+".join(piece.name for piece in options.pieces)
        site = f"decoder.layers.{last.layer}" if last.at == "decoder" else last.at
        effect = _effect_of(first, last)
        if options.skip is not None:
            site, effect = _skipped_at(parts)
        asked = f"stage {number}, {what} at {site}"
        refused = refusal(asked, options, context)
        if refused is not None:
            yield refused
            continue
        yield Decision(
            asked=asked,
            outcome="applied",
            reason=f"class {max(piece.static_class for piece in options.pieces)}",
            effect=effect,
        )
        if options.score is not None and not after.vision.class_token:
            by, instead = (getattr(options.score, key, None) for key in ("by", "instead"))
            if by == "class" and instead is not None:
                yield Decision(
                    asked=f"stage {number}, attention of the class token",
                    outcome="degraded",
                    reason="this encoder has none",
                    effect="tokens are scored by the attention they get from all patches",
                )
    # A router sees tokens, which see no question that stands behind them.
    if any("question" in x.needs or (x.at == "decoder" and x.skip is None) for x in stages):
        yield Decision(
            asked="turns after the first",
            outcome="degraded",
            reason="tokens are chosen by the question",
            effect="a session chooses anew for every prompt; a decoder that is extended keeps the "
            "tokens of its first question",
        )


def _skipped_at(parts: Sequence[Stage]) -> tuple[str, str]:
    """The layers that tokens skip, and how many pass them."""
    first, last = parts[0], parts[-1]
    few, many = (least(part.count_out for part in parts) for least in (min, max))
    passing = f"{few} to {many}" if few != many else str(few)
    number = "one layer" if len(parts) == 1 else f"each of {len(parts)} layers"
    return (
        f"decoder.layers.{first.layer}" + (f" to {last.layer}" if len(parts) > 1 else ""),
        f"{passing} of {first.count_in} tokens pass {number}, and the others skip it",
    )


def _effect_of(first: Stage, last: Stage) -> str:
    """What a stage, of several parts perhaps, does to the tokens of a picture."""
    if last.bottleneck is None:
        return f"{first.count_in} tokens become {last.count_out}"
    return (
        f"{last.count_in} tokens and {last.count_out} rows behind them pass the decoder once, and "
        f"the cache keeps the {last.count_out}"
    )


def _span_of(spec: VlmSpec) -> str:
    """How much of the context a picture takes."""
    grid = spec.vision.grids[0]
    found = span(spec, grid)
    return f"a picture takes {spec.image_tokens(grid) if found is None else found:g} positions"
