"""The reference model's shape: CLIP encoder, two-layer projector, Llama decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from edgevlm.scenes.attention import attend_fully, attend_packed
from edgevlm.scenes.dense import NUM_PATCHES, PATCH
from edgevlm.scenes.tokens import CHAT_TEMPLATE, IMAGE, token_id
from edgevlm.scenes.words import SIDE

WIDTH = 192
PIXEL_MEAN = 0.35
PIXEL_STD = 0.25
VISION_ATTENTION = "edgevlm_scenes_full"
DECODER_ATTENTION = "edgevlm_scenes_packed"


def vision_config() -> CLIPVisionConfig:
    """The vision encoder: 12 x 12 patches and a class token, 6 layers."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=768,
        projection_dim=WIDTH,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The whole model with random weights; seed torch before."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=token_id(tokenizer, IMAGE),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=NUM_PATCHES,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures of any size to 96 x 96 pixels, `<image>` to 144 tokens."""
    square = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessorPil(
        size=square,
        resample=3,
        do_center_crop=False,
        crop_size=square,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def use_training_attention(model: LlavaForConditionalGeneration) -> None:
    """Switch a model to the attention of this package, for training in packed sequences."""
    AttentionInterface.register(VISION_ATTENTION, attend_fully)
    AttentionInterface.register(DECODER_ATTENTION, attend_packed)
    model.model.vision_tower.config._attn_implementation = VISION_ATTENTION
    model.model.language_model.config._attn_implementation = DECODER_ATTENTION


def save_model(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path
) -> None:
    """Write a bfloat16 checkpoint that stock transformers loads; the model itself is untouched."""
    shipped = build_model(processor.tokenizer)
    shipped.load_state_dict(model.state_dict())
    shipped.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=80,
    )
    half: nn.Module = shipped
    half.to(torch.bfloat16)
    shipped.save_pretrained(folder)
    processor.save_pretrained(folder)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels of 0 to 255 as the vision encoder takes them."""
    return (pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD
