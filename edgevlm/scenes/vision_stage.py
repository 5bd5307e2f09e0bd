"""Stage 1: the vision encoder alone learns what lies under each patch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import AttentionInterface, CLIPVisionModel

from edgevlm.scenes.attention import attend_fully
from edgevlm.scenes.dense import patch_targets, picture_targets
from edgevlm.scenes.draw import draw_scene
from edgevlm.scenes.heads import DenseHeads
from edgevlm.scenes.loop import Tallies
from edgevlm.scenes.model import VISION_ATTENTION, WIDTH, normalize, vision_config
from edgevlm.scenes.precision import fast_autocast
from edgevlm.scenes.scene import Sign, check_split, make_scene, spare_signs

_BATCH = 48


class VisionStage:
    """The vision encoder with heads for the dense targets."""

    def __init__(self, seed: int, host: torch.device, start: Path | None = None) -> None:
        """Random weights from the seed, or those of an earlier stage 1 folder."""
        torch.manual_seed(seed)
        AttentionInterface.register(VISION_ATTENTION, attend_fully)
        config = vision_config()
        config._attn_implementation = VISION_ATTENTION
        self._vision = CLIPVisionModel(config)
        self._heads = DenseHeads(WIDTH)
        self.module: nn.Module = nn.ModuleDict({"vision": self._vision, "heads": self._heads})
        if start is not None:
            self.module.load_state_dict(load_file(start / "vision.safetensors"))
        self.module.to(host)
        self._seed = seed
        self._host = host

    def batches(self) -> Dataset[dict[str, torch.Tensor]]:
        """Pictures and dense targets by step."""
        return _Pictures(self._seed)

    def loss(self, batch: dict[str, torch.Tensor], step: int) -> tuple[torch.Tensor, Tallies]:
        """The dense loss."""
        with fast_autocast(self._host):
            seen = self._vision(pixel_values=normalize(batch["pixels"]))
            loss, right = self._heads.loss(
                seen.last_hidden_state, seen.pooler_output, batch["patches"], batch["picture"]
            )
        tallies = {name: (share, 1.0) for name, share in right.items()}
        tallies["pictures"] = (float(len(batch["pixels"])), 1.0)
        return loss, tallies

    def export(self, folder: Path) -> None:
        """Write vision.safetensors (encoder and heads), which stage 2 starts from."""
        save_file(self.module.state_dict(), folder / "vision.safetensors")


class _Pictures(Dataset[dict[str, torch.Tensor]]):
    """Batch `step` holds the pictures step * batch to (step + 1) * batch of the seed's share."""

    def __init__(self, seed: int) -> None:
        self._first = seed * 20_000_000

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        start = self._first + step * _BATCH
        pixels, patches, picture = [], [], []
        for seed in range(start, start + _BATCH):
            scene = make_scene(check_split("train", seed))
            # Characters are the hardest to learn: two thirds of the pictures are full of signs.
            spare: tuple[Sign, ...] = ()
            if seed % 3:
                scene = replace(scene, things=scene.things[: seed % 2 + 1])
                spare = spare_signs(scene)
            pixels.append(np.asarray(draw_scene(scene, spare)))
            patches.append(patch_targets(scene, spare))
            picture.append(picture_targets(scene, spare))
        return {
            "pixels": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
            "patches": torch.from_numpy(np.stack(patches)),
            "picture": torch.from_numpy(np.stack(picture)),
        }
