"""Idefics3 and SmolVLM: SigLIP on tiles, a pixel shuffle with one linear map, and Llama."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgevlm.families.fields import Fields
from edgevlm.families.image_spec import ImageChoices
from edgevlm.families.text import ROTARY_TABLES, decoder_spec, decoder_weights, head_copies
from edgevlm.families.vision import IDEFICS3, encoder_spec, encoder_weights
from edgevlm.families.weights import Section, Source, Weights, same
from edgevlm.model.spec import ProjectorSpec, VlmSpec

EXPANSION = "tiled"
POSITIONS = "sequential"

SECTIONS = (
    Section(name="vision", pattern=r"(model\.)?vision_model\.", prefix="model.vision_model."),
    Section(
        name="projector",
        pattern=r"(model\.)?connector\.modality_projection\.",
        prefix="model.connector.modality_projection.",
    ),
    Section(name="head", pattern=r"lm_head\.", prefix="lm_head."),
    Section(name="text", pattern=r"(model\.)?text_model\.", prefix="model.text_model."),
)


def spec(config: Mapping[str, Any], files: Mapping[str, bytes], choices: ImageChoices) -> VlmSpec:
    """Read an idefics3 or smolvlm config."""
    family = str(config["model_type"])
    top = Fields(config, family=family)
    vision_fields, text_fields = top.section("vision_config"), top.section("text_config")
    # The processor's sizes, and switches of the code that trained SmolVLM.
    vision_fields.ignore("max_image_size", "size", "tie_word_embeddings", "use_base_siglip")
    vision = encoder_spec(
        vision_fields, IDEFICS3, features=(-1,), drop_first_row=False, post_norm=True
    )
    text_fields.choice("model_type", ("llama",), "llama")
    # Fields of Idefics2's resampler and of training; with a resampler it would be another model.
    text_fields.only("qk_layer_norms", False)
    text_fields.only("rope_interleaved", False)
    text_fields.only("use_resampler", False)
    text_fields.ignore(
        "is_llama_config",
        "perceiver_config",
        "pixel_shuffle_factor",
        "tie_word_embeddings",
        "transformers.js_config",
    )
    tied = top.take("tie_word_embeddings", bool, False)
    decoder = decoder_spec(text_fields, "llama", tied=tied)
    merge = top.take("scale_factor", int, 2)
    height, width = vision.grids[0]
    if height % merge or width % merge:
        raise top.error(
            f"scale_factor {merge} does not divide a grid of {height} x {width} patches"
        )
    image_token_id = top.take("image_token_id", int, 128257)
    top.ignore(
        "image_seq_len", "transformers.js_config", "use_reentrant_checkpointing", "vocab_size"
    )
    top.finish()
    return VlmSpec(
        family=family,
        vision=vision,
        projector=ProjectorSpec(
            kind="pixel_shuffle",
            in_width=vision.width,
            out_width=decoder.width,
            bias=False,
            merge=merge,
        ),
        decoder=decoder,
        image_token_id=image_token_id,
    )


def weights(spec: VlmSpec) -> Weights:
    """Where each weight comes from."""
    return Weights(
        sections=SECTIONS,
        sources=dict(_sources(spec)),
        unused=(ROTARY_TABLES, r"vision\.embeddings\.position_ids"),
        copies=head_copies(spec.decoder),
    )


def _sources(spec: VlmSpec) -> Iterable[tuple[str, Source]]:
    """Ours, and theirs relative to their sections."""
    yield from encoder_weights(spec.vision)
    yield "projector.linear.weight", same("projector.proj.weight")
    yield from decoder_weights(spec.decoder)
