"""What stages have learned, from a file: a safetensors file with the model's own names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edgevlm.document import Complaint, suggest
from edgevlm.model.fusion import Fusion
from edgevlm.model.learning import Learning
from edgevlm.model.remember import Remember
from edgevlm.model.spec import VlmSpec
from edgevlm.model.vlm import Vlm, place

__all__ = ["check_weights", "learned_weights", "teach"]


def learned_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The learned weights of a model's stages: (name, weight)."""
    for name, module in model.named_modules():
        if isinstance(module, Learning):
            for inner, weight in module.learned.named_parameters():
                yield f"{name}.learned.{inner}", weight
        if isinstance(module, (Fusion, Remember)):
            for inner, weight in module.named_parameters():
                yield f"{name}.{inner}", weight


def check_weights(spec: VlmSpec, path: Path) -> None:
    """Raise Complaint where a file does not hold what the stages of a spec have learned."""
    with torch.device("meta"):
        wanted = {name: tuple(weight.shape) for name, weight in learned_weights(Vlm(spec))}
    if not wanted:
        raise Complaint("no stage has learned anything", hint="remove weights", key="weights")
    if not path.is_file():
        raise Complaint(f"there is no file {str(path)!r}", hint="give its path", key="weights")
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                found[name] = tuple(file.get_slice(name).get_shape())
    except SafetensorError as error:
        raise Complaint(
            f"{path.name} is not a whole safetensors file: {error}",
            hint="save it again",
            key="weights",
        ) from None
    for name in sorted(wanted.keys() - found.keys()):
        raise Complaint(
            f"{path.name} lacks the tensor {name!r}",
            hint="save it by the names of the model",
            key="weights",
        )
    for name, shape in sorted(found.items()):
        if name not in wanted:
            raise Complaint(
                f"{path.name} has the tensor {name!r}, which no stage takes",
                hint=suggest(name, list(wanted)),
                key="weights",
            )
        if shape != wanted[name]:
            raise Complaint(
                f"{name!r} in {path.name} has shape {list(shape)}, expected {list(wanted[name])}",
                hint="train it for this model and these stages",
                key="weights",
            )


def teach(model: Vlm, path: Path) -> None:
    """Put the weights of a file, which was checked, in their places."""
    with safe_open(path, framework="pt") as file:
        for name, _ in list(learned_weights(model)):
            place(model, name, file.get_tensor(name).to(torch.float32).clone())
    model.tie()
