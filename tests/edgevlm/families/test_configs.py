"""Configs as the Hub has them, and fields that a family must refuse by name."""

from __future__ import annotations

from typing import Any

import pytest

from edgevlm.errors import ModelError
from edgevlm.families import family_of
from edgevlm.families.generation import generation_spec
from edgevlm.families.image_spec import ImageChoices
from edgevlm.model.spec import VlmSpec
from tests.edgevlm.families.published import (
    LLAVA_15,
    LLAVA_INTERLEAVE,
    QWEN25_VL_3B,
    QWEN25_VL_BOTH,
    SMOLDOCLING,
    SMOLVLM,
    SMOLVLM2_2B,
)

GRIDS = ImageChoices(grids=((32, 32),))


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


def test_pictures_that_are_not_whole_patches() -> None:
    """27 patches of 14 leave 6 of 384 pixels out; the processor makes 384."""
    for config, tokens in ((SMOLVLM2_2B, 81), (LLAVA_INTERLEAVE, 729)):
        spec = read(config)
        assert spec.vision.grids == ((27, 27),)
        assert spec.vision.pixels_shape((27, 27)) == (3, 384, 384)
        assert spec.image_tokens((27, 27)) == tokens
    assert len(spec.vision.layers) == 26
    assert spec.decoder.tied
    assert spec.decoder.layers[0].attention.qkv_bias
    assert spec.decoder.layers[0].attention.window is None


def test_a_text_section_goes_before_its_copy_at_the_top() -> None:
    assert read(QWEN25_VL_BOTH) == read(QWEN25_VL_3B)


def test_a_config_with_the_defaults_of_generation_in_it() -> None:
    spec = read(SMOLDOCLING)
    assert (spec.decoder.width, len(spec.decoder.layers)) == (576, 30)
    assert spec.image_tokens(spec.vision.grids[0]) == 64


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


def test_the_processor_cuts_the_patches_of_the_encoder() -> None:
    family = family_of("qwen2_5_vl")
    files = {"preprocessor_config.json": b'{"patch_size": 14, "merge_size": 2}'}
    assert family.spec(QWEN25_VL_3B, files, GRIDS) == read(QWEN25_VL_3B)
    files = {"preprocessor_config.json": b'{"patch_size": 14, "merge_size": 4}'}
    with pytest.raises(ModelError) as error:
        family.spec(QWEN25_VL_3B, files, GRIDS)
    assert str(error.value) == (
        "preprocessor_config.json: merge_size is 4, the vision encoder's is 2\n"
        "  hint: take both files from the same checkpoint"
    )


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
