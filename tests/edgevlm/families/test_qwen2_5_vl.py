"""Family qwen2_5_vl against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from edgevlm.families.image_spec import ImageChoices
from tests.edgevlm.families.referee import Prompt, check, saved_and_loaded, worthy

IMAGE_TOKEN = 90
# Windows of 3 x 3 squares, 6 x 6 patches.
VISION = {
    "depth": 3,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_heads": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 24,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 64,
}
TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
    },
}
# One window, windows of one size, and two ragged ones: of 4 sizes, and of 2.
GRIDS = ((6, 6), (12, 12), (8, 14), (6, 10))

CASES = {
    "untied": Qwen2_5_VLConfig(vision_config=VISION, text_config=TEXT),
    "tied, mqa, windows in the decoder": Qwen2_5_VLConfig(
        vision_config=VISION | {"fullatt_block_indexes": [0, 2]},
        text_config=TEXT
        | {
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
        tie_word_embeddings=True,
    ),
}


def prompt(grid: tuple[int, int], seed: int) -> Prompt:
    """A picture between words: its rows stand at their row and column, time stands still."""
    words = torch.randint(1, 80, (12,), generator=torch.Generator().manual_seed(7))
    height, width = grid
    pixels = torch.randn(height * width, 96, generator=torch.Generator().manual_seed(seed))
    rows, columns = height // 2, width // 2
    image = torch.full((rows * columns,), IMAGE_TOKEN)
    token_ids = torch.cat([words[:5], image, words[5:]])
    place = torch.arange(rows * columns)
    picture = torch.stack([torch.zeros_like(place), place // columns, place % columns]) + 5
    after = 5 + max(rows, columns) + torch.arange(7)
    positions = torch.cat([torch.arange(5).expand(3, 5), picture, after.expand(3, 7)], dim=1)
    return Prompt(
        token_ids=token_ids,
        pixels=pixels[None],
        theirs={
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, height, width]]),
            "mm_token_type_ids": (token_ids == IMAGE_TOKEN).int()[None],
        },
        positions=positions,
        grid=grid,
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    config.image_token_id = IMAGE_TOKEN
    pairs = [(prompt(grid, seed=2), prompt(grid, seed=3)) for grid in GRIDS]
    theirs = worthy(Qwen2_5_VLForConditionalGeneration(config), pairs)
    ours = saved_and_loaded(theirs, tmp_path, ImageChoices(grids=GRIDS))
    for pair in pairs:
        check(theirs, ours, pair[0])
