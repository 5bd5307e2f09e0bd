"""Weights into a model: one at a time, so that the peak is one copy in float32.

The model is built without memory. Each weight is allocated, filled from its tensors in the
memory-mapped shards (whose pages are let go at once), checked, and put in its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgevlm.errors import ModelError
from edgevlm.families.weights import Source, Weights
from edgevlm.model.drawing import draw_weights
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm, place

if TYPE_CHECKING:
    from edgevlm.checkpoint import Checkpoint

FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor of a shard; `name` is what the shard calls it."""

    name: str
    shard: Path
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """The tensor, in memory that is mapped for as long as it lives."""
        with safe_open(self.shard, framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(self.name)
            return tensor


def load_model(checkpoint: Checkpoint, spec: VlmSpec) -> Vlm:
    """The model of a checkpoint, in evaluation mode."""
    with torch.device("meta"):
        model = Vlm(spec)
    if checkpoint.seed is not None:
        draw_weights(model, checkpoint.seed)
        return model.eval()
    weights = checkpoint.family.weights(spec)
    stored = _stored(checkpoint.shards, weights)
    _check_claims(stored, weights, checkpoint.source)
    for name, weight in list(model.named_parameters()):
        place(model, name, _read(name, stored, weights.sources[name], weight))
    model.tie()
    for theirs, ours in weights.copies.items():
        if theirs in stored:
            _check_copy(stored[theirs], model.get_parameter(ours))
    return model.eval()


def reference_weights(model: Vlm, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The weights by the names and in the shapes of transformers, as views of ours."""
    for name, source in weights.sources.items():
        weight = model.get_parameter(name)
        for part, rows in zip(source.parts, _shares(source, weight), strict=True):
            yield weights.absolute(part.name), rows.view(part.shape or rows.shape)
    for theirs, ours in weights.copies.items():
        yield weights.absolute(theirs), model.get_parameter(ours)


def _stored(shards: tuple[Path, ...], weights: Weights) -> dict[str, Stored]:
    """Every tensor of the shards, by its name relative to its section."""
    found: dict[str, Stored] = {}
    for path in shards:
        try:
            with safe_open(path, framework="pt") as shard:
                for name in list(shard.keys()):
                    entry = shard.get_slice(name)
                    stored = Stored(
                        name=name,
                        shard=path,
                        shape=tuple(entry.get_shape()),
                        dtype=entry.get_dtype(),
                    )
                    other = found.setdefault(weights.relative(name), stored)
                    if other is not stored:
                        raise ModelError(
                            f"{name!r} and {other.name!r} are the same weight",
                            hint="save the checkpoint again, with one of them",
                        )
        except SafetensorError as error:
            raise ModelError(
                f"{path.name} is not a whole safetensors file: {error}",
                hint="download the checkpoint again, all of it",
            ) from error
    return found


def _check_claims(stored: Mapping[str, Stored], weights: Weights, source: str) -> None:
    """Refuse a tensor that nothing claims, and a claim without a tensor."""
    claimed = {part.name for entry in weights.sources.values() for part in entry.parts}
    missing = sorted(claimed - stored.keys())
    if missing:
        raise ModelError(
            f"{source} lacks the tensor {weights.absolute(missing[0])!r}" + _more(missing),
            hint="download the checkpoint again, all of it, or take the config that belongs to it",
        )
    unclaimed = sorted(
        name
        for name in stored.keys() - claimed - weights.copies.keys()
        if not weights.is_unused(name)
    )
    if unclaimed:
        raise ModelError(
            f"{source} has the tensor {stored[unclaimed[0]].name!r}, which nothing in the model "
            "takes" + _more(unclaimed),
            hint="take the config that belongs to the checkpoint",
        )


def _more(names: list[str]) -> str:
    """How many others there are."""
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _read(name: str, stored: Mapping[str, Stored], source: Source, weight: Tensor) -> Tensor:
    """A weight, from its parts."""
    value = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    for part, rows in zip(source.parts, _shares(source, value), strict=True):
        entry = stored[part.name]
        expected = part.shape or tuple(rows.shape)
        if entry.shape != expected:
            raise ModelError(
                f"{entry.name!r} has shape {list(entry.shape)}, expected {list(expected)} by "
                "config.json",
                hint="take the config that belongs to the checkpoint",
            )
        if entry.dtype not in FLOATS:
            raise ModelError(
                f"{entry.name!r} is {entry.dtype}, expected one of {', '.join(FLOATS)}",
                hint="take the checkpoint as it was before it was quantized",
            )
        rows.copy_(entry.read().view(rows.shape))
        if rows.numel() and not all(math.isfinite(end) for end in torch.aminmax(rows)):
            raise ModelError(
                f"{entry.name!r} has a NaN or an infinity in it",
                hint="the checkpoint is broken: download it again, or train it again",
            )
    return value


def _shares(source: Source, weight: Tensor) -> tuple[Tensor, ...]:
    """The rows of a weight that each part fills."""
    if len(source.parts) == 1:
        return (weight,)
    return torch.split(weight, [part.shape[0] for part in source.parts if part.shape])


def _check_copy(stored: Stored, weight: Tensor) -> None:
    """Refuse a tied tensor that was saved all the same, and is another."""
    if stored.shape != tuple(weight.shape) or not torch.equal(stored.read().float(), weight):
        raise ModelError(
            f"{stored.name!r} differs from the embedding, to which config.json ties it",
            hint="set tie_word_embeddings to false in config.json",
        )
