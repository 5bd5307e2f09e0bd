"""What pieces share that are learned: their weights, and the layers they are made of.

A piece says what its weights are called, their shapes and how training begins with them; the module
of its stage holds them and shows them to it in its view. Matrices are [in, out] and stand behind
the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgevlm.decisions import Decision
from edgevlm.document import Complaint
from edgevlm.reduce.extent import extent_of
from edgevlm.reduce.view import View

if TYPE_CHECKING:
    from torch import Tensor

    from edgevlm.model.spec import VlmSpec
    from edgevlm.reduce.solve import Problem

__all__ = ["Weight", "drawn", "learned", "numpy_learned"]

NEVER = -1e9
"""A likeness that softmax makes nothing of."""
EPSILON = 1e-5

# B groups, T rows of text, N rows, C width, H heads


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A tensor that is learned: its shape, and what it is before training.

    `normal` has a deviation of `deviation`, or where none is given of one over the root of the rows
    that a product sums over.
    """

    shape: tuple[int, ...]
    start: Literal["normal", "zeros", "ones"] = "normal"
    deviation: float | None = None


def drawn(name: str, weight: Weight) -> np.ndarray:
    """A weight [shape] float32 as training begins with it, the same for the same name."""
    if weight.start != "normal":
        return np.full(weight.shape, 1.0 if weight.start == "ones" else 0.0, np.float32)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    deviation = weight.deviation or weight.shape[-2] ** -0.5
    values = np.random.default_rng(seed).standard_normal(weight.shape)
    return (values * deviation).astype(np.float32)


def check_heads(width: int, heads: int, what: str = "heads") -> None:
    """Raise Complaint where heads do not share rows evenly."""
    if width % heads:
        raise Complaint(
            f"{heads} {what} do not share rows of {width} numbers evenly",
            hint=f"choose a number of {what} that divides {width}",
        )


def check_learned(spec: VlmSpec) -> None:
    """Raise Complaint where what a stage learns does not fit a model."""
    assert spec.reduction is not None
    for grid, stages in spec.reduction.stages:
        for stage in stages:
            for piece in stage.pieces:
                try:
                    shapes = piece.weights(extent_of(spec, stage))
                except Complaint as complaint:
                    message = f"stage {stage.number}: {complaint.message}"
                    raise Complaint(message, hint=complaint.hint) from None
                if shapes and grid != spec.vision.grids[0]:
                    raise Complaint(
                        f"stage {stage.number}: {piece.name!r} is learned for one grid, and "
                        f"pictures come in {len(spec.vision.grids)}",
                        hint="name one grid in image.grids",
                    )


def untrained(problem: Problem, file: str | None) -> Iterator[Decision]:
    """What becomes of what learns, where no weights are given."""
    fusion = problem.fusion
    if fusion is not None:
        yield Decision(
            asked=f"fusion of text and pictures in {fusion.layers} layers",
            outcome="degraded",
            reason="text comes in a fixed number of rows",
            effect=f"the last {fusion.rows} rows of a prompt's text are fused, others stay",
        )
    learning = [] if fusion is None else ["what the fusion learned"]
    learning += [] if problem.remember is None else ["what looking again learned"]
    for number, stage in enumerate(problem.stages, 1):
        names = [piece.name for piece in stage.pieces if piece.is_learned]
        learning += [f"stage {number}, what {' and '.join(names)} learned"] if names else []
    for asked in learning if file is None else ():
        yield Decision(
            asked=asked,
            outcome="degraded",
            reason="no weights are given",
            effect="it is as training begins with it; write weights: FILE.safetensors",
        )


def learned(view: View[Tensor], piece: str) -> Mapping[str, Tensor]:
    """The weights of a piece."""
    return view.learned[piece]


def numpy_learned(view: View[np.ndarray], piece: str) -> Mapping[str, np.ndarray]:
    """The twin of `learned`, in float64."""
    return {name: value.astype(np.float64) for name, value in view.learned[piece].items()}


def norm_weights(name: str, width: int) -> dict[str, Weight]:
    """Weights of a layer norm."""
    return {
        f"{name}_scale": Weight(shape=(width,), start="ones"),
        f"{name}_shift": Weight(shape=(width,), start="zeros"),
    }


def linear_weights(name: str, rows: int, columns: int) -> dict[str, Weight]:
    """Weights of a linear map with a bias."""
    return {
        name: Weight(shape=(rows, columns)),
        f"{name}_bias": Weight(shape=(columns,), start="zeros"),
    }


def attention_weights(name: str, width: int, keys: int | None = None) -> dict[str, Weight]:
    """Weights of an attention whose keys and values come from rows of `keys` numbers."""
    from_keys = keys or width
    return {
        **linear_weights(f"{name}_q", width, width),
        **linear_weights(f"{name}_k", from_keys, width),
        **linear_weights(f"{name}_v", from_keys, width),
        **linear_weights(f"{name}_out", width, width),
    }


def normed(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Layer norm of rows [..., C]."""
    from torch.nn import functional

    scale, shift = weights[f"{name}_scale"], weights[f"{name}_shift"]
    return functional.layer_norm(x, scale.shape, scale, shift, EPSILON)


def numpy_normed(weights: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """The twin of `normed`."""
    centred = x - x.mean(-1, keepdims=True)
    found = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + EPSILON)
    scaled: np.ndarray = found * weights[f"{name}_scale"] + weights[f"{name}_shift"]
    return scaled


def linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Rows [..., C] through a matrix, with its bias."""
    return x @ weights[name] + weights[f"{name}_bias"]


def numpy_linear(weights: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """The twin of `linear`."""
    found: np.ndarray = x @ weights[name] + weights[f"{name}_bias"]
    return found


def attended(
    weights: Mapping[str, Tensor],
    name: str,
    rows: Tensor,
    keys: Tensor,
    heads: int,
    values: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Rows [B, N, C] that attend to keys [B, T, K] and values; those of no `weight` [B, T] hide."""
    q, k, v = (
        linear(weights, f"{name}_{part}", x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part, x in (("q", rows), ("k", keys), ("v", keys if values is None else values))
    )
    likeness = q @ k.mT * q.shape[-1] ** -0.5
    if weight is not None:
        likeness = likeness + (1.0 - (weight > 0).to(likeness.dtype))[:, None, None] * NEVER
    mixed = (likeness.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return linear(weights, f"{name}_out", mixed)


def numpy_attended(
    weights: Mapping[str, np.ndarray],
    name: str,
    rows: np.ndarray,
    keys: np.ndarray,
    heads: int,
    values: np.ndarray | None = None,
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """The twin of `attended`, head by head, over the rows of some weight alone."""
    values = keys if values is None else values
    groups = []
    for group, ours in enumerate(rows):
        seen = slice(None) if weight is None else np.flatnonzero(weight[group] > 0)
        q = numpy_linear(weights, f"{name}_q", ours)
        k = numpy_linear(weights, f"{name}_k", keys[group][seen])
        v = numpy_linear(weights, f"{name}_v", values[group][seen])
        size = q.shape[-1] // heads
        mixed = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            likeness = np.exp(q[:, part] @ k[:, part].T * size**-0.5)
            mixed.append(likeness / likeness.sum(-1, keepdims=True) @ v[:, part])
        groups.append(numpy_linear(weights, f"{name}_out", np.concatenate(mixed, -1)))
    return np.array(groups)


def attention_macs(rows: int, keys: int, width: int, key_width: int | None = None) -> int:
    """Multiply-adds of `attended`."""
    projected = 2 * rows * width * width + 2 * keys * (key_width or width) * width
    return projected + 2 * rows * keys * width


def activated(x: Tensor) -> Tensor:
    """GELU."""
    from edgevlm_export.ops import activate

    return activate(x, "gelu")


def numpy_gelu(x: np.ndarray) -> np.ndarray:
    """x times the share of a normal distribution below it."""
    from math import erf

    return np.asarray(x * 0.5 * (1.0 + np.vectorize(erf)(x / np.sqrt(2.0))))
