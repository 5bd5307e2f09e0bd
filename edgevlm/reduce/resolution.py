"""A model for smaller pictures: its grid, its positions, and what a picture becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgevlm.document import Complaint
from edgevlm.model.spec import VlmSpec
from edgevlm.reduce.piece import Transform
from edgevlm.reduce.plan import Grid, Reduction
from edgevlm_runtime.images.spec import FixedGeometry, ImageSpec

if TYPE_CHECKING:
    from edgevlm.model.vlm import Vlm

__all__ = ["fit_positions", "reduced"]


def check_resolution(spec: VlmSpec) -> None:
    """Raise Complaint where the size of pictures is not ours to choose."""
    kind = ImageSpec.from_json(spec.image).geometry.kind
    if kind != "fixed":
        raise Complaint(
            f"pictures of this model are {kind}, and only those of one fixed size can be smaller",
            hint="name smaller grids in image.grids"
            if kind == "native"
            else "put the stage at projector",
        )
    if spec.vision.position != "learned":
        raise Complaint(
            f"positions of patches are {spec.vision.position}, and only a learned table is "
            "interpolated",
            hint="put the stage at projector",
        )


def reduced(spec: VlmSpec, reduction: Reduction) -> VlmSpec:
    """The spec with a reduction, whose pictures come smaller where a stage says so."""
    transform, old = _resize(reduction), spec.vision.grids[0]
    if transform is None or transform[1] == old:
        return replace(spec, reduction=reduction)
    new = transform[1]
    image = ImageSpec.from_json(spec.image)
    assert isinstance(image.geometry, FixedGeometry), "checked before the stages were sized"
    size = new[0] * spec.vision.patch_size, new[1] * spec.vision.patch_size
    return replace(
        spec,
        vision=replace(spec.vision, grids=(new,), image_size=None),
        image=replace(image, geometry=_geometry(image.geometry, size)).to_json(),
        reduction=replace(reduction, stages=((new, dict(reduction.stages)[old]),)),
    )


def fit_positions(model: Vlm, after: VlmSpec) -> None:
    """Interpolate a model's table of positions for the grid of a spec; a class token keeps its."""
    import torch

    assert after.reduction is not None
    found, old = _resize(after.reduction), model.spec.vision.grids[0]
    if found is None or found[1] == old:
        return
    transform, new = found
    position = model.vision.embed.position
    assert position is not None, "checked before the stages were sized"
    first = int(model.spec.vision.class_token)
    table = position.weight.detach()
    down, across = (
        torch.from_numpy(transform.matrix(before, now))
        for before, now in zip(old, new, strict=True)
    )
    cells = table[first:].double().unflatten(0, old)
    cells = torch.einsum("ih,jw,hwc->ijc", down, across, cells).flatten(0, 1)
    fitted = torch.cat([table[:first], cells.to(table.dtype)])
    position.weight = torch.nn.Parameter(fitted, requires_grad=False)


def _resize(reduction: Reduction) -> tuple[Transform, Grid] | None:
    """The stage that makes pictures smaller, and the grid it makes of them."""
    _, stages = reduction.stages[0]
    for stage in reversed(stages):
        if stage.at == "input" and stage.transform is not None:
            assert stage.grid_out is not None
            return stage.transform, stage.grid_out
    return None


def _geometry(geometry: FixedGeometry, size: tuple[int, int]) -> FixedGeometry:
    """The same part of a picture at another size of the tensor."""
    if geometry.crop is None:
        return replace(geometry, size=size)
    if geometry.size is None and geometry.shortest_edge is None:
        raise Complaint(
            "pictures are cut to their size and not resized, so that smaller ones would show less",
            hint="put the stage at projector",
        )
    shares = [new / old for new, old in zip(size, geometry.crop, strict=True)]
    edge, whole = geometry.shortest_edge, geometry.size
    if edge is not None:
        edge = max(1, round(edge * max(shares)))
    if whole is not None:
        whole = max(1, round(whole[0] * shares[0])), max(1, round(whole[1] * shares[1]))
    return replace(geometry, shortest_edge=edge, size=whole, crop=size)
