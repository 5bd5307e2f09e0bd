"""Family llava against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.edgevlm.families.referee import Prompt, check, saved_and_loaded, worthy

IMAGE_TOKEN = 90
CLIP = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPE_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPE_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
ROPE_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

CASES = {
    "clip, llama": LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT)
    ),
    "siglip of 4 1/4 patches, qwen2, tied, full": LlavaConfig(
        vision_config=SiglipVisionConfig(**CLIP | {"image_size": 34}),
        text_config=Qwen2Config(**TEXT, tie_word_embeddings=True),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    ),
    "siglip, first patch dropped": LlavaConfig(
        vision_config=SiglipVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT)
    ),
    "clip, mistral with a window, mqa, wide heads": LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=MistralConfig(
            **TEXT | {"num_key_value_heads": 1, "head_dim": 24}, sliding_window=9
        ),
        projector_hidden_act="gelu_pytorch_tanh",
    ),
    "several feature layers, biases, no projector bias": LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP | {"hidden_act": "gelu"}),
        text_config=LlamaConfig(**TEXT, attention_bias=True, mlp_bias=True),
        vision_feature_layer=[0, -3, 3],
        vision_feature_select_strategy="full",
        multimodal_projector_bias=False,
    ),
    "qwen2 with windows in some layers": LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=Qwen2Config(
            **TEXT, use_sliding_window=True, sliding_window=7, max_window_layers=1
        ),
    ),
    "llama3 rope": LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**TEXT, rope_parameters=ROPE_LLAMA3),
    ),
    "yarn rope": LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**TEXT, rope_parameters=ROPE_YARN),
    ),
    "linear rope": LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**TEXT, rope_parameters=ROPE_LINEAR),
    ),
    "dynamic rope": LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**TEXT, rope_parameters=ROPE_DYNAMIC),
    ),
}


def prompt(num_image_tokens: int, size: int, seed: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 80, (12,), generator=torch.Generator().manual_seed(7))
    pixels = torch.randn(2, 3, size, size, generator=generator)
    image = torch.full((num_image_tokens,), IMAGE_TOKEN)
    token_ids = torch.cat([words[:3], image, words[3:7], image, words[7:]])
    return Prompt(
        token_ids=token_ids,
        pixels=pixels,
        theirs={"pixel_values": pixels},
        positions=torch.arange(len(token_ids)),
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    config.image_token_index = IMAGE_TOKEN
    num_tokens = 17 if "CLIP" in type(config.vision_config).__name__ else 16
    num_tokens -= config.vision_feature_select_strategy == "default"
    size = config.vision_config.image_size
    pair = prompt(num_tokens, size, seed=2), prompt(num_tokens, size, seed=3)
    theirs = worthy(LlavaForConditionalGeneration(config), [pair])
    ours = saved_and_loaded(theirs, tmp_path)
    assert ours.spec.image_tokens((4, 4)) == num_tokens
    check(theirs, ours, pair[0])
