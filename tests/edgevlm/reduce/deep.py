"""Small models with stages within the decoder, and prompts with pictures to run them on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgevlm.device import load_device
from edgevlm.model.spec import VlmSpec
from edgevlm.model.stages import Pictures
from edgevlm.model.vlm import Vlm
from edgevlm.passes.base import Context
from edgevlm.passes.reduce import Reduce
from edgevlm.reduce.catalogue import load_method
from edgevlm_runtime.row_weights import row_weights
from tests.edgevlm.tiny import drawn, tiny_spec

GRID = (6, 6)
TOKENS = 36
SILENT = (7, 8, 9)
"""Tokens that mean nothing."""

# T rows of a prompt, A of the answer that is fed, P pictures, W width


def deep_spec(num_layers: int = 4, *, tied: bool = True) -> VlmSpec:
    """The small LLaVA with more layers in the decoder, and pictures of 36 tokens."""
    spec = tiny_spec(tied=tied)
    layer = spec.decoder.layers[0]
    return dataclasses.replace(
        spec,
        vision=dataclasses.replace(spec.vision, grids=(GRID,)),
        image={**spec.image, "geometry": {"kind": "fixed", "size": [48, 48]}, "tokens": [TOKENS]},
        decoder=dataclasses.replace(spec.decoder, layers=(layer,) * num_layers),
    )


def staged(spec: VlmSpec, *stages: Mapping[str, Any], keep: float | None = None) -> VlmSpec:
    """The same with stages as a recipe writes them, at a budget where one of them asks for it."""
    asks = any(str(stage.get("keep", "budget")).startswith("budget") for stage in stages)
    step = Reduce.model_validate({"stages": stages, "keep": keep if asks else None})
    context = Context(device=load_device("host-cpu"), targets=("ort",))
    return step.foresee(spec, context).spec


def deep_stages(method: str, layers: Sequence[int]) -> list[dict[str, Any]]:
    """The first stages of a method within the decoder, before these layers."""
    deep = [stage for stage in load_method(method).stages if stage.at == "decoder"]
    return [
        {**stage.model_dump(mode="json", exclude_none=True, exclude={"depth"}), "layer": layer}
        for stage, layer in zip(deep, layers, strict=False)
    ]


def skipping(skip: Any, schedule: Any, **more: Any) -> dict[str, Any]:
    """A stage whose tokens skip layers, as a recipe writes it."""
    stage = {"at": "decoder", "schedule": schedule, "score": "router", "select": "top"}
    return {**stage, "skip": skip, **more}


def model_of(spec: VlmSpec, seed: int = 0) -> Vlm:
    """The model, drawn from a seed."""
    return drawn(spec, seed)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt [1, T + A, W] with pictures and an answer behind it.

    `weights` [T + A] by kind are 0 for the rows of the answer.
    """

    rows: Tensor
    positions: Tensor
    starts: np.ndarray
    weights: Mapping[str, np.ndarray]
    num_prompt: int

    @property
    def pictures(self) -> Pictures:
        """As the model takes them."""
        return Pictures(
            starts=torch.from_numpy(self.starts),
            last=torch.tensor([self.num_prompt - 1]),
            weights={kind: torch.from_numpy(x)[None] for kind, x in self.weights.items()},
        )

    def prompt(self) -> Asked:
        """Without the answer."""
        end = self.num_prompt
        return Asked(
            rows=self.rows[:, :end],
            positions=self.positions[:end],
            starts=self.starts,
            weights={kind: x[:end] for kind, x in self.weights.items()},
            num_prompt=end,
        )


def asked(model: Vlm, num_pictures: int = 1, *, answer: Sequence[int] = (), seed: int = 3) -> Asked:
    """Some text, then every picture with a word behind it, then a question."""
    random = np.random.default_rng(seed)
    tokens = model.spec.entering
    image = model.spec.image_token_id
    ids = [*random.integers(3, 80, 4)]
    starts = []
    for _ in range(num_pictures):
        starts.append(len(ids))
        ids += [image] * tokens
        ids.append(int(random.integers(10, 80)))
    ids += [11, 7, 25, 31, 8, 64, 9, 70]
    token_ids = np.array(ids, np.int64)
    seen = torch.from_numpy(
        random.standard_normal((num_pictures * tokens, model.spec.decoder.width))
    ).float()
    with torch.no_grad():
        rows = model.embed(torch.from_numpy(token_ids), seen)
        fed = model.embedding(torch.tensor(list(answer), dtype=torch.long))[None]
    image_rows = np.flatnonzero(token_ids == image)
    none = np.zeros(len(answer), np.float32)
    weights = row_weights(token_ids, image_rows, SILENT)
    return Asked(
        rows=torch.cat([rows, fed], 1),
        positions=torch.arange(len(ids) + len(answer)),
        starts=np.array(starts, np.int64),
        weights={kind: np.concatenate([x, none]) for kind, x in weights.items()},
        num_prompt=len(ids),
    )
