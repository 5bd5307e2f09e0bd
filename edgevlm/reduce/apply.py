"""What a stage does with the tokens it is shown, in torch, and the same by definition in numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.errors import ModelError
from edgevlm.reduce.lattice import centres
from edgevlm.reduce.members import followed, numpy_followed, numpy_way_of_rows, way_of_rows
from edgevlm.reduce.order import in_order, numpy_in_order
from edgevlm.reduce.plan import Stage
from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import View, picked

if TYPE_CHECKING:
    from torch import Tensor


def apply_stage(stage: Stage, view: View[Tensor]) -> VisSeq[Tensor]:
    """The tokens that leave a stage, in the order of their places where it merges."""
    from edgevlm_export.ops import take_rows

    view = replace(view, dense=stage.dense)
    tokens = view.tokens
    if stage.transform is not None:
        return _transformed(stage, tokens)
    if stage.bottleneck is not None:
        return _followed_by(tokens, stage.bottleneck.torch(view, stage.count_out))
    if stage.merge is not None:
        merged = _traced(stage, view, stage.merge.torch(view, stage.count_out))
        # Between the encoder's layers order says nothing; the encoder puts it right behind them.
        if stage.at == "encoder.layers":
            return merged
        if stage.merge.is_ordered:
            return replace(merged, grid=stage.grid_out)
        return replace(in_order(merged, dense=view.dense), grid=stage.grid_out)
    scores, kept = chosen_rows(stage, view)
    if stage.rest is not None and stage.extra:
        assert scores is not None, "checked when the stage was sized"
        made = stage.rest.torch(view, scores, kept, stage.extra)
        places = picked(tokens.places, made.places, dense=view.dense)
        return _traced(stage, view, replace(made, places=places, grid=stage.grid_out))
    sizes, is_traced = tokens.sizes, tokens.provenance is not None
    taken = VisSeq(
        features=take_rows(tokens.features, kept, view.dense),
        places=picked(tokens.places, kept, dense=view.dense),
        sizes=None if sizes is None else picked(sizes, kept, dense=view.dense),
        grid=stage.grid_out,
        provenance=way_of_rows(kept, tokens.features.shape[1]) if is_traced else None,
    )
    return _traced(stage, view, taken)


def _traced(stage: Stage, view: View[Tensor], made: VisSeq[Tensor]) -> VisSeq[Tensor]:
    """With the way of the tokens before any stage, where somebody asks."""
    way = view.tokens.provenance
    if way is None:
        return replace(made, provenance=None)
    if made.provenance is None:
        raise _unknown_way(stage)
    return replace(made, provenance=followed(way, made.provenance, dense=view.dense))


def _unknown_way(stage: Stage) -> ModelError:
    return ModelError(
        f"{stage.name!r} does not say where tokens went, and positions of several places ask",
        hint="choose another merge, or remove ppe",
    )


def chosen_rows(stage: Stage, view: View[Tensor]) -> tuple[Tensor | None, Tensor]:
    """Scores [B, N] where there are any, and rows [B, k] of the tokens that a stage selects."""
    assert stage.select is not None, "a stage has a verb"
    view = replace(view, dense=stage.dense)
    scores = None if stage.score is None else stage.score.torch(view)
    return scores, stage.select.torch(view, scores, stage.count_out - stage.extra)


def _followed_by(tokens: VisSeq[Tensor], rows: Tensor) -> VisSeq[Tensor]:
    """Tokens [B, N, C] and behind them the same rows [m, C] in every group."""
    import torch

    features, places = tokens.features, tokens.places
    behind = rows.expand(features.shape[0], -1, -1)
    count = features.shape[1]
    numbers = torch.arange(count, count + rows.shape[0]).expand(places.shape[0], -1)
    return VisSeq(features=torch.cat([features, behind], 1), places=torch.cat([places, numbers], 1))


def _transformed(stage: Stage, tokens: VisSeq[Tensor]) -> VisSeq[Tensor]:
    """Both sides of the grid mapped: [B, h, w, C] to [B, h', w', C]."""
    import torch

    down, across = _matrices(stage)
    assert stage.grid_in is not None
    assert stage.grid_out is not None
    x = tokens.features
    width = x.shape[-1]
    rows = torch.from_numpy(down.astype(np.float32)) @ x.reshape(
        -1, stage.grid_in[0], stage.grid_in[1] * width
    )
    cells = rows.reshape(-1, stage.grid_in[1], width)
    cells = torch.from_numpy(across.astype(np.float32)) @ cells
    return VisSeq(
        features=cells.reshape(-1, stage.count_out, width),
        places=tokens.places.index_select(1, torch.tensor(_centres(stage))),
        grid=stage.grid_out,
    )


def numpy_apply_stage(stage: Stage, view: View[np.ndarray]) -> VisSeq[np.ndarray]:
    """The twin of `apply_stage`."""
    tokens = view.tokens
    if stage.transform is not None:
        return _numpy_transformed(stage, tokens)
    if stage.bottleneck is not None:
        return _numpy_followed_by(tokens, stage.bottleneck.numpy(view, stage.count_out))
    if stage.merge is not None:
        merged = _numpy_traced(stage, view, stage.merge.numpy(view, stage.count_out))
        if stage.at == "encoder.layers":
            return merged
        return replace(numpy_in_order(merged), grid=stage.grid_out)
    assert stage.select is not None, "a stage has a verb"
    scores = None if stage.score is None else stage.score.numpy(view)
    kept = stage.select.numpy(view, scores, stage.count_out - stage.extra)
    if stage.rest is not None and stage.extra:
        assert scores is not None, "checked when the stage was sized"
        made = stage.rest.numpy(view, scores, kept, stage.extra)
        places = np.take_along_axis(tokens.places, made.places, 1)
        return _numpy_traced(stage, view, replace(made, places=places, grid=stage.grid_out))
    sizes = tokens.sizes
    taken = VisSeq(
        features=np.take_along_axis(tokens.features, kept[..., None], 1),
        places=np.take_along_axis(tokens.places, kept, 1),
        sizes=None if sizes is None else np.take_along_axis(sizes, kept, 1),
        grid=stage.grid_out,
        provenance=numpy_way_of_rows(kept, tokens.features.shape[1]),
    )
    return _numpy_traced(stage, view, taken)


def _numpy_followed_by(tokens: VisSeq[np.ndarray], rows: np.ndarray) -> VisSeq[np.ndarray]:
    """The twin of `_followed_by`."""
    groups, count, _ = tokens.features.shape
    numbers = np.tile(np.arange(count, count + len(rows)), (groups, 1))
    return VisSeq(
        features=np.concatenate([tokens.features, np.tile(rows, (groups, 1, 1))], 1),
        places=np.concatenate([tokens.places, numbers], 1),
    )


def _numpy_traced(
    stage: Stage, view: View[np.ndarray], made: VisSeq[np.ndarray]
) -> VisSeq[np.ndarray]:
    """The twin of `_traced`."""
    way = view.tokens.provenance
    if way is None:
        return replace(made, provenance=None)
    if made.provenance is None:
        raise _unknown_way(stage)
    return replace(made, provenance=numpy_followed(way, made.provenance))


def _numpy_transformed(stage: Stage, tokens: VisSeq[np.ndarray]) -> VisSeq[np.ndarray]:
    """One matrix of the whole grid, the Kronecker product of both sides'."""
    down, across = _matrices(stage)
    whole = np.kron(down, across)
    return VisSeq(
        features=np.einsum("kn,bnc->bkc", whole, tokens.features),
        places=tokens.places[:, _centres(stage)],
        grid=stage.grid_out,
    )


def _matrices(stage: Stage) -> tuple[np.ndarray, np.ndarray]:
    """The maps of the two sides."""
    assert stage.transform is not None
    assert stage.grid_in is not None
    assert stage.grid_out is not None
    height, width = (
        stage.transform.matrix(old, new)
        for old, new in zip(stage.grid_in, stage.grid_out, strict=True)
    )
    return height, width


def _centres(stage: Stage) -> list[int]:
    """The tokens that came which those of the new grid stand for."""
    assert stage.grid_in is not None
    assert stage.grid_out is not None
    return centres(stage.grid_in, stage.grid_out)
