"""Stage 1: the vision encoder alone learns what lies under each patch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import AttentionInterface, CLIPVisionModel

from edgevlm.scenes.attention import attend_fully
from edgevlm.scenes.dense import stack_targets
from edgevlm.scenes.draw import draw_scene
from edgevlm.scenes.heads import DenseHeads
from edgevlm.scenes.loop import Tallies
from edgevlm.scenes.model import VISION_ATTENTION, WIDTH, normalize, vision_config
from edgevlm.scenes.scene import check_split, make_scene

_BATCH = 48


class VisionStage:
    """The vision encoder with heads for the dense targets."""

    def __init__(self, seed: int, host: torch.device) -> None:
        torch.manual_seed(seed)
        AttentionInterface.register(VISION_ATTENTION, attend_fully)
        config = vision_config()
        config._attn_implementation = VISION_ATTENTION
        self.module: nn.Module = nn.ModuleDict(
            {"vision": CLIPVisionModel(config), "heads": DenseHeads(WIDTH)}
        ).to(host)
        self._seed = seed
        self._host = host

    def batches(self) -> Dataset[dict[str, torch.Tensor]]:
        return _Pictures(self._seed)

    def loss(self, batch: dict[str, torch.Tensor], step: int) -> tuple[torch.Tensor, Tallies]:
        with torch.autocast(self._host.type, torch.bfloat16):
            seen = self.module["vision"](pixel_values=normalize(batch["pixels"]))
            loss, right = self.module["heads"].loss(
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
        scenes = [make_scene(check_split("train", seed)) for seed in range(start, start + _BATCH)]
        patches, picture = stack_targets(scenes)
        pixels = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
        return {
            "pixels": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
            "patches": torch.from_numpy(patches),
            "picture": torch.from_numpy(picture),
        }
