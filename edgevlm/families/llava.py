"""LLaVA: CLIP or SigLIP, an MLP, and Llama, Mistral or Qwen2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgevlm.families.fields import Fields
from edgevlm.families.image_spec import ImageChoices
from edgevlm.families.text import ROTARY_TABLES, decoder_spec, decoder_weights, head_copies
from edgevlm.families.vision import CLIP, SIGLIP, encoder_spec, encoder_weights
from edgevlm.families.weights import Section, Source, Weights, linear
from edgevlm.model.spec import ProjectorSpec, VlmSpec

EXPANSION = "plain"
POSITIONS = "sequential"

ENCODERS = {"clip_vision_model": CLIP, "siglip_vision_model": SIGLIP}
DECODERS = ("llama", "mistral", "qwen2")
SECTIONS = (
    Section(
        name="vision",
        pattern=r"(model\.)?vision_tower\.(vision_model\.)?",
        prefix="model.vision_tower.",
    ),
    Section(
        name="projector",
        pattern=r"(model\.)?multi_modal_projector\.",
        prefix="model.multi_modal_projector.",
    ),
    Section(name="head", pattern=r"(language_model\.)?lm_head\.", prefix="lm_head."),
    Section(
        name="text",
        pattern=r"(language_model\.model\.|model\.language_model\.)",
        prefix="model.language_model.",
    ),
)


def spec(config: Mapping[str, Any], files: Mapping[str, bytes], choices: ImageChoices) -> VlmSpec:
    """Read a llava config."""
    top = Fields(config, family="llava")
    vision_fields, text_fields = top.section("vision_config"), top.section("text_config")
    kind = vision_fields.choice("model_type", ENCODERS, "clip_vision_model")
    # `vocab_size` and `projection_dim` belong to CLIP's text tower, the head to SigLIP's pooling.
    vision_fields.ignore("projection_dim", "vision_use_head", "vocab_size")
    strategy = top.choice("vision_feature_select_strategy", ("default", "full"), "default")
    vision = encoder_spec(
        vision_fields,
        kind,
        features=_feature_layers(top),
        drop_first_row=strategy == "default",
        post_norm=False,
    )
    # transformers forwards the text section's choice where the top says nothing.
    tied = top.take("tie_word_embeddings", bool, False)
    tied = text_fields.take("tie_word_embeddings", bool, False) or tied
    decoder_kind = text_fields.choice("model_type", DECODERS, "llama")
    decoder = decoder_spec(text_fields, decoder_kind, tied=tied)
    projector = ProjectorSpec(
        kind="mlp",
        in_width=vision.out_width,
        hidden_width=decoder.width,
        out_width=decoder.width,
        activation=top.activation("projector_hidden_act", "gelu"),
        bias=top.take("multimodal_projector_bias", bool, True),
    )
    token_name = "image_token_index" if "image_token_index" in top else "image_token_id"
    image_token_id = top.take(token_name, int, 32000)
    # Tokens per picture follow from the encoder; the processor repeats them.
    top.ignore(
        "ignore_index", "image_seq_length", "image_token_id", "image_token_index", "vocab_size"
    )
    top.finish()
    return VlmSpec(
        family="llava",
        vision=vision,
        projector=projector,
        decoder=decoder,
        image_token_id=image_token_id,
    )


def weights(spec: VlmSpec) -> Weights:
    """Where each weight comes from."""
    kept = len(spec.vision.layers)
    return Weights(
        sections=SECTIONS,
        sources=dict(_sources(spec)),
        unused=(
            ROTARY_TABLES,
            r"vision\.head\..*",
            r"vision\.post_layernorm\..*",
            r"vision\.embeddings\.position_ids",
            rf"vision\.encoder\.layers\.(?!({'|'.join(map(str, range(kept)))})\.)\d+\..*",
        ),
        copies=head_copies(spec.decoder),
    )


def _sources(spec: VlmSpec) -> Iterable[tuple[str, Source]]:
    """Ours, and theirs relative to their sections."""
    yield from encoder_weights(spec.vision)
    yield from linear("projector.up", "projector.linear_1", bias=spec.projector.bias)
    yield from linear("projector.down", "projector.linear_2", bias=spec.projector.bias)
    yield from decoder_weights(spec.decoder)


def _feature_layers(top: Fields) -> tuple[int, ...]:
    """`vision_feature_layer`: one hidden state, or several side by side."""
    name = "vision_feature_layer"
    if isinstance(top.peek(name), list):
        layers = top.take(name, list)
        if not layers or not all(type(index) is int for index in layers):
            raise top.error(f"{name} is {layers!r}, expected layer numbers")
        return tuple(layers)
    return (top.take(name, int, -2),)
