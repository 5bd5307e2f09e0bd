"""Configs as the Hub has them, and fields that a family must refuse by name."""

from __future__ import annotations

from typing import Any

import pytest

from edgevlm.errors import ModelError
from edgevlm.families import family_of
from edgevlm.families.generation import generation_spec
from edgevlm.families.image_spec import ImageChoices
from edgevlm.model.spec import VlmSpec

GRIDS = ImageChoices(grids=((32, 32),))

# As published: what is not said has the default of its class.
LLAVA_15: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
# Flat: the text section's fields stand at the top.
QWEN25_VL_3B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
SMOLVLM: dict[str, Any] = {
    "architectures": ["Idefics3ForConditionalGeneration"],
    "image_token_id": 49190,
    "model_type": "idefics3",
    "pad_token_id": 2,
    "scale_factor": 4,
    "text_config": {
        "_attn_implementation_autoset": False,
        "_flash_attn_2_enabled": True,
        "head_dim": 64,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "neftune_noise_alpha": 0.0,
        "num_attention_heads": 15,
        "num_hidden_layers": 32,
        "num_key_value_heads": 5,
        "pad_token_id": 2,
        "perceiver_config": {"resampler_depth": 6, "resampler_n_heads": 16},
        "pixel_shuffle_factor": 4,
        "qk_layer_norms": False,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "use_resampler": False,
        "vocab_size": 49280,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": True,
    "use_reentrant_checkpointing": False,
    "vision_config": {
        "hidden_size": 768,
        "image_size": 512,
        "max_image_size": {"longest_edge": 512},
        "model_type": "idefics3",
        "num_attention_heads": 12,
        "patch_size": 16,
        "size": {"longest_edge": 2048},
        "tie_word_embeddings": False,
        "use_base_siglip": False,
    },
    "vocab_size": 49280,
}


def read(config: dict[str, Any], choices: ImageChoices = GRIDS) -> VlmSpec:
    return family_of(config["model_type"]).spec(config, {}, choices)


def refusal(config: dict[str, Any], choices: ImageChoices = GRIDS) -> str:
    with pytest.raises(ModelError) as error:
        read(config, choices)
    return str(error.value)


def with_field(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one field set, by its dotted path."""
    head, _, rest = path.partition(".")
    return config | {head: with_field(config[head], rest, value) if rest else value}


def test_llava_15_means_its_defaults() -> None:
    spec = read(LLAVA_15)
    assert spec.image_tokens(spec.vision.grids[0]) == 576
    assert len(spec.vision.layers) == 23
    assert spec.vision.layers[0].mlp.activation == "quick_gelu"
    decoder = spec.decoder
    assert (decoder.width, len(decoder.layers), decoder.vocab_size) == (4096, 32, 32064)
    assert decoder.layers[0].attention.num_kv_heads == 32
    assert decoder.layers[0].mlp.width == 11008
    assert decoder.norm.eps == 1e-5
    assert not decoder.tied


def test_old_and_flat_qwen_configs_are_the_new_ones() -> None:
    old = read(QWEN25_VL_3B)
    text = {
        key: value
        for key, value in QWEN25_VL_3B.items()
        if key not in ("rope_theta", "rope_scaling", "vision_config", "model_type")
        and not key.endswith("token_id")
    }
    new = {
        key: value for key, value in QWEN25_VL_3B.items() if key not in text and "rope" not in key
    }
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1000000.0,
        "mrope_section": [16, 24, 24],
    }
    assert read(new | {"text_config": text}) == old
    assert old.decoder.tied
    assert old.decoder.rope.sections == (16, 24, 24)
    assert old.decoder.layers[0].attention.window is None
    assert [i for i, layer in enumerate(old.vision.layers) if layer.mixer == "attention"] == [
        7,
        15,
        23,
        31,
    ]
    assert old.image_tokens((32, 32)) == 256


def test_smolvlm_as_published() -> None:
    spec = read(SMOLVLM)
    assert spec.image_tokens(spec.vision.grids[0]) == 64
    assert spec.decoder.layers[0].attention.num_kv_heads == 5
    assert spec.decoder.rope.inv_freq[1] == pytest.approx(100000 ** (-1 / 32), rel=1e-6)
    assert read(SMOLVLM | {"model_type": "smolvlm"}).family == "smolvlm"


UNSUPPORTED = {
    "unknown at the top": (
        with_field(LLAVA_15, "sinks", 4),
        "config.json: family 'llava' does not know 'sinks' = 4\n"
        "  hint: remove it if it has no effect on the model; else the family must learn it",
    ),
    "two unknown, nested": (
        with_field(with_field(LLAVA_15, "text_config.b", None), "text_config.a", [1]),
        "config.json: family 'llava' does not know 'text_config.a' = [1], 'text_config.b' = None\n"
        "  hint: remove it if it has no effect on the model; else the family must learn it",
    ),
    "unknown in the rope": (
        with_field(QWEN25_VL_3B, "rope_scaling.beta", 1),
        "config.json: family 'qwen2_5_vl' does not know 'rope_scaling.beta' = 1\n"
        "  hint: remove it if it has no effect on the model; else the family must learn it",
    ),
    "rope kind": (
        with_field(LLAVA_15, "text_config.rope_scaling", {"type": "longrope"}),
        "config.json: 'text_config.rope_scaling.type' is 'longrope', which family 'llava' lacks: "
        "it has 'default', 'dynamic', 'linear', 'llama3', 'yarn'\n"
        "  hint: compile a checkpoint with one of these",
    ),
    "partial rotary": (
        with_field(LLAVA_15, "text_config.partial_rotary_factor", 0.5),
        "config.json: 'text_config.partial_rotary_factor' is 0.5, which family 'llava' does not "
        "do: it does 1.0\n  hint: compile a checkpoint without it",
    ),
    "quantized": (
        with_field(SMOLVLM, "quantization_config", {"bits": 4}),
        "config.json: 'quantization_config' is {'bits': 4}, which family 'idefics3' does not do\n"
        "  hint: compile a checkpoint without it",
    ),
    "resampler": (
        with_field(SMOLVLM, "text_config.use_resampler", True),
        "config.json: 'text_config.use_resampler' is True, which family 'idefics3' does not do: "
        "it does False\n  hint: compile a checkpoint without it",
    ),
    "activation": (
        with_field(LLAVA_15, "projector_hidden_act", "mish"),
        "config.json: 'projector_hidden_act' is 'mish', which family 'llava' lacks: it has "
        "'gelu', 'gelu_new', 'gelu_pytorch_tanh', 'quick_gelu', 'relu', 'silu', 'swish'\n"
        "  hint: compile a checkpoint with one of these",
    ),
    "text model": (
        with_field(LLAVA_15, "text_config.model_type", "gemma"),
        "config.json: 'text_config.model_type' is 'gemma', which family 'llava' lacks: it has "
        "'llama', 'mistral', 'qwen2'\n  hint: compile a checkpoint with one of these",
    ),
    "type": (
        with_field(LLAVA_15, "vision_config.hidden_size", "wide"),
        "config.json: 'vision_config.hidden_size' is 'wide', expected int\n"
        "  hint: take config.json from the checkpoint's own repository",
    ),
    "missing section": (
        {"model_type": "llava"},
        "config.json: 'vision_config' is missing, which family 'llava' needs\n"
        "  hint: take config.json from the checkpoint's own repository",
    ),
    "feature layer": (
        with_field(LLAVA_15, "vision_feature_layer", [-2, 25]),
        "config.json: vision_feature_layer is 25, and the encoder has 24 layers\n"
        "  hint: take config.json from the checkpoint's own repository",
    ),
    "shared heads": (
        with_field(SMOLVLM, "text_config.num_key_value_heads", 4),
        "config.json: 15 attention heads do not share 4 key-value heads evenly\n"
        "  hint: take config.json from the checkpoint's own repository",
    ),
    "shuffle": (
        with_field(SMOLVLM, "scale_factor", 5),
        "config.json: scale_factor 5 does not divide a grid of 32 x 32 patches\n"
        "  hint: take config.json from the checkpoint's own repository",
    ),
    "sections": (
        with_field(QWEN25_VL_3B, "rope_scaling.mrope_section", [16, 24]),
        "config.json: mrope_section is [16, 24], expected three numbers that add up to 64, half "
        "the head size\n  hint: take config.json from the checkpoint's own repository",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_a_family_does_not_do_is_said_by_name(name: str) -> None:
    config, message = UNSUPPORTED[name]
    assert refusal(config) == message


def test_grids_are_whole_squares() -> None:
    assert refusal(QWEN25_VL_3B, ImageChoices(grids=((32, 31),))) == (
        "a grid of 32 x 31 patches does not divide into squares of 2 x 2\n"
        "  hint: choose multiples of 2"
    )


def test_weights_alone_need_no_grid() -> None:
    assert read(QWEN25_VL_3B, ImageChoices()).vision.grids == ((8, 8),)


def test_generation_defaults_and_wishes() -> None:
    spec, notes = generation_spec({"text_config": {"eos_token_id": 5}}, None)
    assert (spec.eos_token_ids, spec.temperature, notes) == ((5,), 0.0, ())
    spec, notes = generation_spec(
        {"eos_token_id": 5},
        {
            "eos_token_id": [7, 8],
            "pad_token_id": 7,
            "do_sample": True,
            "temperature": 0.1,
            "top_p": 0.9,
            "repetition_penalty": 1.05,
            "num_beams": 1,
        },
    )
    assert (spec.eos_token_ids, spec.pad_token_id) == ((7, 8), 7)
    assert (spec.temperature, spec.top_k, spec.top_p) == (0.1, 50, 0.9)
    assert notes == (
        "generation_config.json asks for repetition_penalty = 1.05, which a bundle does not do",
    )
