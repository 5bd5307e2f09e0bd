"""Families idefics3 and smolvlm against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.edgevlm.families.referee import Prompt, check, saved_and_loaded, worthy

IMAGE_TOKEN = 90
VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}

CASES = {
    "idefics3": (
        Idefics3ForConditionalGeneration,
        Idefics3Config(vision_config=VISION, text_config=TEXT, scale_factor=2),
    ),
    "smolvlm of 4 3/4 patches, tied, mqa, shuffle by 4": (
        SmolVLMForConditionalGeneration,
        SmolVLMConfig(
            vision_config=VISION | {"image_size": 38},
            text_config=TEXT | {"num_key_value_heads": 1, "head_dim": 32},
            scale_factor=4,
            tie_word_embeddings=True,
        ),
    ),
    # 25 x 25 patches: float32 rounding puts some of them into their neighbour's bucket.
    "smolvlm, shared position rows, biases": (
        SmolVLMForConditionalGeneration,
        SmolVLMConfig(
            vision_config=VISION | {"image_size": 50, "patch_size": 2, "num_hidden_layers": 1},
            text_config=TEXT | {"attention_bias": True, "mlp_bias": True},
            scale_factor=5,
        ),
    ),
}


def prompt(num_image_tokens: int, size: int, seed: int) -> Prompt:
    """Two tiles of one picture."""
    words = torch.randint(1, 80, (12,), generator=torch.Generator().manual_seed(7))
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    image = torch.full((num_image_tokens,), IMAGE_TOKEN)
    token_ids = torch.cat([words[:3], image, words[3:7], image, words[7:]])
    return Prompt(
        token_ids=token_ids,
        pixels=pixels,
        theirs={"pixel_values": pixels[None]},
        positions=torch.arange(len(token_ids)),
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    kind, config = CASES[name]
    config.image_token_id = IMAGE_TOKEN
    size = config.vision_config.image_size
    side = size // config.vision_config.patch_size
    num_tokens = (side // config.scale_factor) ** 2
    pair = prompt(num_tokens, size, seed=2), prompt(num_tokens, size, seed=3)
    theirs = worthy(kind(config), [pair])
    ours = saved_and_loaded(theirs, tmp_path)
    assert ours.spec.image_tokens((side, side)) == num_tokens
    check(theirs, ours, pair[0])
