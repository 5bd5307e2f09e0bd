"""Random views before the decoder, in torch and in numpy, and stages made by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgevlm.reduce.apply import apply_stage, numpy_apply_stage
from edgevlm.reduce.extent import Extent
from edgevlm.reduce.learned import drawn
from edgevlm.reduce.options import StageOptions
from edgevlm.reduce.plan import Stage
from edgevlm.reduce.seq import Probe, VisSeq
from edgevlm.reduce.view import View

GRID = (4, 6)
NUM_TOKENS = 24
WIDTH = 20
KINDS = ("class token", "none", "squares", "windows")
"""A tower with a class token and one without, a projector that joins squares of 2 x 2 patches, and
a tower whose layers have the patches in the order of their windows."""


@dataclass(frozen=True, kw_only=True)
class Both:
    """The same view twice."""

    torch: View[Tensor]
    numpy: View[np.ndarray]

    def tokens(self, **changes: Any) -> Both:
        """With other tokens: numpy arrays, or anything that is no array."""
        tensors = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in changes.items()
        }
        return Both(
            torch=replace(self.torch, tokens=replace(self.torch.tokens, **tensors)),
            numpy=replace(self.numpy, tokens=replace(self.numpy.tokens, **changes)),
        )


def views(
    kind: str = "class token", batch: int = 1, *, seed: int = 0, dtype: type = np.float32
) -> Both:
    """A view with everything that a piece at the encoder or the projector may look at."""
    numbers = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return numbers.standard_normal(shape).astype(dtype)

    side = 2 if kind == "squares" else 1
    num_patches = NUM_TOKENS * side**2
    first = int(kind == "class token")
    order = numbers.permutation(num_patches) if kind == "windows" else None
    probes: dict[int | str, Probe[np.ndarray]] = {
        layer: Probe(
            q=normal(batch, first + num_patches, 4 * 6),
            k=normal(batch, first + num_patches, kv_heads * 6),
            num_heads=4,
            num_kv_heads=kv_heads,
            scale=6**-0.5,
            first=first,
            class_row=0 if first else None,
            order=order,
        )
        for layer, kv_heads in (("own", 2), (-1, 4), (-2, 2))
    }
    words = numbers.uniform(size=(1, 5))
    weights = {"text": words, "question": words * [[0, 1, 1, 1, 0]], "words": words[:, ::-1] ** 2}
    in_numpy = View(
        tokens=VisSeq(
            features=normal(batch, NUM_TOKENS, WIDTH) + normal(batch, 1, WIDTH),
            places=np.tile(np.arange(NUM_TOKENS), (batch, 1)),
            grid=GRID,
        ),
        probes=probes,
        encoded=normal(batch, num_patches, 16),
        squares=np.arange(num_patches).reshape(-1, 4) if side == 2 else None,
        question=normal(1, 5, WIDTH),
        asked={kind: given.astype(dtype) for kind, given in weights.items()},
    )
    return Both(torch=as_torch(in_numpy), numpy=in_numpy)


def as_torch(view: View[np.ndarray]) -> View[Tensor]:
    """The same numbers."""

    def tensor(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.array(array, order="C"))

    tokens = view.tokens
    probes = {
        layer: replace(probe, q=tensor(probe.q), k=tensor(probe.k), order=tensor(probe.order))
        for layer, probe in view.probes.items()
    }
    return View(
        tokens=replace(tokens, features=tensor(tokens.features), places=tensor(tokens.places)),
        probes=probes,
        encoded=tensor(view.encoded),
        squares=tensor(view.squares),
        question=tensor(view.question),
        asked={kind: tensor(weights) for kind, weights in view.asked.items()},
    )


def stage(count_out: int, *, at: str = "encoder", **written: Any) -> Stage:
    """A stage as it is written in a recipe, for the tokens of a view."""
    named = {"layers": (0,)} if at == "encoder.layers" else {}
    options = StageOptions.model_validate({"at": at, **named, **written})
    grid_out = GRID if count_out == NUM_TOKENS else None
    if options.transform is not None:
        grid_out = options.transform.grid(GRID, count_out)
        assert grid_out[0] * grid_out[1] == count_out
    extra = 0
    if options.rest is not None and count_out < NUM_TOKENS:
        extra = options.rest.extra(count_out, NUM_TOKENS)
    return Stage(
        at=options.at,
        layer=None,
        count_in=NUM_TOKENS,
        count_out=count_out,
        grid_in=GRID,
        grid_out=grid_out,
        place="repack",
        score=options.score,
        select=options.select,
        rest=options.rest,
        merge=options.merge,
        transform=options.transform,
        extra=extra,
    )


def taught(made: Stage, both: Both) -> Both:
    """With weights of learned pieces: what training begins with, and some noise."""
    extent = Extent(
        tokens=NUM_TOKENS,
        kept=made.count_out,
        width=WIDTH,
        depth=2,
        encoder_width=WIDTH,
    )
    noise = np.random.default_rng(1)
    weights = {
        piece.name: {
            name: drawn(name, weight) + 0.1 * noise.standard_normal(weight.shape).astype(np.float32)
            for name, weight in piece.weights(extent).items()
        }
        for piece in made.pieces
    }
    shape = both.numpy.tokens.features.shape[0], made.count_out, WIDTH
    registers = noise.standard_normal(shape).astype(np.float32)
    tensors = {
        piece: {name: torch.from_numpy(x) for name, x in named.items()}
        for piece, named in weights.items()
    }
    return Both(
        torch=replace(both.torch, learned=tensors, registers=torch.from_numpy(registers)),
        numpy=replace(both.numpy, learned=weights, registers=registers),
    )


def in_both(made: Stage, both: Both) -> tuple[VisSeq[Tensor], VisSeq[np.ndarray]]:
    """What a stage makes of a view in torch, and what its twin makes."""
    both = taught(made, both)
    return apply_stage(made, both.torch), numpy_apply_stage(made, both.numpy)


def left_by(made: Stage, both: Both) -> VisSeq[np.ndarray]:
    """What a stage makes of a view in torch, as numpy arrays."""
    found = apply_stage(made, taught(made, both).torch)
    sizes = found.sizes
    return VisSeq(
        features=found.features.numpy(),
        places=found.places.numpy(),
        sizes=None if sizes is None else sizes.numpy(),
        grid=found.grid,
    )
