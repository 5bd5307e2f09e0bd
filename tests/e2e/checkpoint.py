"""A small LLaVA checkpoint in Hugging Face form, with the scenes' tokenizer and lively weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from edgevlm.scenes.model import build_model, build_processor
from edgevlm.scenes.tokens import build_tokenizer


def save_tiny_checkpoint(folder: Path, *, layers: int = 2) -> Path:
    """Two layers each, 64 wide; weights louder than usual, so that answers vary."""
    tokenizer = build_tokenizer()
    shape = build_model(tokenizer).config
    for part in (shape.vision_config, shape.text_config):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers = 64, 96, layers
        part.num_attention_heads = 4
    shape.vision_config.projection_dim = 64
    shape.text_config.num_key_value_heads, shape.text_config.head_dim = 2, 16
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(shape)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 2.0 / weight[0].numel() ** 0.5, generator=generator)
            else:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    return folder


def write_recipe(folder: Path, *lines: str) -> Path:
    """A recipe for the checkpoint `tiny` beside it."""
    path = folder / "recipe.yaml"
    path.write_text("\n".join(["model: tiny", "device: host-cpu", *lines]) + "\n")
    return path
