"""Names of tensors as the Hub has them: each is claimed, or known to be unused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from edgevlm.families import family_of
from edgevlm.families.image_spec import ImageChoices
from tests.edgevlm.families.published import LLAVA_15, QWEN25_VL_3B, SMOLVLM


def both(name: str) -> Iterator[str]:
    yield f"{name}.weight"
    yield f"{name}.bias"


def decoder(prefix: str, num_layers: int, *, qkv_bias: bool = False) -> Iterator[str]:
    yield f"{prefix}.embed_tokens.weight"
    yield f"{prefix}.norm.weight"
    for index in range(num_layers):
        layer = f"{prefix}.layers.{index}"
        for part in ("q", "k", "v"):
            projection = f"{layer}.self_attn.{part}_proj"
            yield from both(projection) if qkv_bias else [f"{projection}.weight"]
        yield f"{layer}.self_attn.o_proj.weight"
        yield from (f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        yield f"{layer}.input_layernorm.weight"
        yield f"{layer}.post_attention_layernorm.weight"


def encoder(prefix: str, num_layers: int) -> Iterator[str]:
    yield f"{prefix}.embeddings.patch_embedding.weight"
    yield f"{prefix}.embeddings.position_embedding.weight"
    yield from both(f"{prefix}.post_layernorm")
    parts = ("k_proj", "v_proj", "q_proj", "out_proj")
    for index in range(num_layers):
        layer = f"{prefix}.encoder.layers.{index}"
        for part in (*(f"self_attn.{part}" for part in parts), "mlp.fc1", "mlp.fc2"):
            yield from both(f"{layer}.{part}")
        yield from (*both(f"{layer}.layer_norm1"), *both(f"{layer}.layer_norm2"))


def llava_15() -> Iterator[str]:
    vision = "vision_tower.vision_model"
    yield from encoder(vision, 24)
    yield f"{vision}.embeddings.class_embedding"
    yield from both(f"{vision}.pre_layrnorm")
    for part in ("linear_1", "linear_2"):
        yield from both(f"multi_modal_projector.{part}")
    yield from decoder("language_model.model", 32)
    yield "language_model.lm_head.weight"


def smolvlm() -> Iterator[str]:
    yield from encoder("model.vision_model", 12)
    yield "model.vision_model.embeddings.patch_embedding.bias"
    yield "model.connector.modality_projection.proj.weight"
    yield from decoder("model.text_model", 32)
    yield "lm_head.weight"


def qwen25_vl_3b() -> Iterator[str]:
    yield "visual.patch_embed.proj.weight"
    for index in range(32):
        block = f"visual.blocks.{index}"
        yield from (f"{block}.norm1.weight", f"{block}.norm2.weight")
        for part in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            yield from both(f"{block}.{part}")
    yield "visual.merger.ln_q.weight"
    yield from (*both("visual.merger.mlp.0"), *both("visual.merger.mlp.2"))
    yield from decoder("model", 36, qkv_bias=True)


@pytest.mark.parametrize(
    ("config", "names", "left_out"),
    [
        # The last layer and the norm after it are not read: vision_feature_layer is -2.
        (LLAVA_15, llava_15, 16 + 2),
        (SMOLVLM, smolvlm, 0),
        (QWEN25_VL_3B, qwen25_vl_3b, 0),
    ],
    ids=["llava-1.5-7b-hf", "SmolVLM-500M-Instruct", "Qwen2.5-VL-3B-Instruct"],
)
def test_every_tensor_is_claimed_once(config: dict[str, Any], names: Any, left_out: int) -> None:
    family = family_of(config["model_type"])
    weights = family.weights(family.spec(config, {}, ImageChoices(grids=((32, 32),))))
    claims = [part.name for source in weights.sources.values() for part in source.parts]
    stored = [weights.relative(name) for name in names()]
    assert len(set(stored)) == len(stored)
    unused = [name for name in stored if name not in set(claims)]
    assert sorted(claims) == sorted(set(stored) - set(unused))
    assert all(weights.is_unused(name) for name in unused)
    assert len(unused) == left_out
