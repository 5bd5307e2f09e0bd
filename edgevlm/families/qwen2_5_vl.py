"""Qwen2.5-VL: a ViT of windows at native resolution, a patch merger, and Qwen2 with M-RoPE.

Pictures of any size would need a graph of any shape. A bundle has one vision graph for each patch
grid that the recipe chooses, and the positions and windows of that grid are constants in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgevlm.errors import ModelError
from edgevlm.families.fields import Fields
from edgevlm.families.image_spec import ImageChoices
from edgevlm.families.processor_files import IMAGE_PROCESSOR, PROCESSOR, image_processor
from edgevlm.families.text import ROTARY_TABLES, decoder_spec, decoder_weights, head_copies
from edgevlm.families.vision import vision_attention
from edgevlm.families.weights import (
    LayerNames,
    Section,
    Source,
    Weights,
    layer_weights,
    linear,
    norm,
    same,
)
from edgevlm.model.spec import LayerSpec, MlpSpec, NormSpec, ProjectorSpec, VisionSpec, VlmSpec

EXPANSION = "plain"
POSITIONS = "mrope"

# transformers writes this number into its vision code.
VISION_NORM = NormSpec(kind="rms", eps=1e-6)

SECTIONS = (
    Section(name="projector", pattern=r"(model\.)?visual\.merger\.", prefix="model.visual.merger."),
    Section(name="vision", pattern=r"(model\.)?visual\.", prefix="model.visual."),
    Section(name="head", pattern=r"lm_head\.", prefix="lm_head."),
    Section(
        name="text",
        pattern=r"model\.(language_model\.)?",
        prefix="model.language_model.",
    ),
)

VISION_LAYER = LayerNames(
    norm1="norm1",
    qkv=("attn.qkv",),
    out="attn.proj",
    norm2="norm2",
    mlp={"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
)

# What an old config writes into the top level, where a new one has a text section. Those written
# between the two have both, and transformers reads the section.
TEXT_FIELDS = frozenset(
    [
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "use_sliding_window",
        "vocab_size",
    ]
)


def spec(config: Mapping[str, Any], files: Mapping[str, bytes], choices: ImageChoices) -> VlmSpec:
    """Read a qwen2_5_vl config."""
    top = Fields(config, family="qwen2_5_vl")
    tied = top.take("tie_word_embeddings", bool, False)
    if "text_config" in top:
        text_fields = top.section("text_config")
        top.ignore(*TEXT_FIELDS)
        tied = text_fields.take("tie_word_embeddings", bool, False) or tied
    else:
        text_fields = top.split(TEXT_FIELDS)
    # Fields of pictures as tokens, which only the tokenizer's side uses.
    ids = ("image_token_id", "video_token_id", "vision_end_token_id", "vision_start_token_id")
    text_fields.ignore(*ids, "vision_token_id")
    decoder = decoder_spec(text_fields, "qwen2_5_vl_text", tied=tied)
    vision_fields = top.section("vision_config")
    out_width = vision_fields.take("out_hidden_size", int, 3584)
    vision = _vision(vision_fields, choices)
    if out_width != decoder.width:
        raise top.error(
            f"the vision encoder gives {out_width} numbers a row, and the decoder takes "
            f"{decoder.width}"
        )
    _check_patches(files, vision)
    image_token_id = top.take("image_token_id", int, 151655)
    top.ignore(*ids, "text_config", "vision_token_id")
    top.finish()
    return VlmSpec(
        family="qwen2_5_vl",
        vision=vision,
        projector=ProjectorSpec(
            kind="patch_merger",
            in_width=vision.width,
            hidden_width=vision.width * vision.merge**2,
            out_width=out_width,
            activation="gelu",
            bias=True,
            merge=vision.merge,
            norm=VISION_NORM,
        ),
        decoder=decoder,
        image_token_id=image_token_id,
    )


def weights(spec: VlmSpec) -> Weights:
    """Where each weight comes from."""
    return Weights(
        sections=SECTIONS,
        sources=dict(_sources(spec)),
        unused=(ROTARY_TABLES, r"vision\.rotary_pos_emb\.inv_freq"),
        copies=head_copies(spec.decoder),
    )


def _vision(fields: Fields, choices: ImageChoices) -> VisionSpec:
    """Read the vision section, all of it."""
    width = fields.take("hidden_size", int, 3584)
    num_heads = fields.take("num_heads", int, 16)
    depth = fields.take("depth", int, 32)
    patch = fields.take("patch_size", int, 14)
    merge = fields.take("spatial_merge_size", int, 2)
    channels = fields.take("in_channels", int, 3)
    window = fields.take("window_size", int, 112) // merge // patch * merge
    rope = fields.section("rope_parameters") if "rope_parameters" in fields else None
    theta = 10000.0
    if rope is not None:
        rope.only("rope_type", "axial", "default")
        rope.only("type", "axial", "default")
        theta = rope.take("rope_theta", float, theta)
        rope.finish()
    # Old configs say these twice; time is of videos.
    fields.only("in_chans", channels)
    fields.only("spatial_patch_size", patch)
    fields.ignore("rope_parameters", "tokens_per_second")
    full = set(fields.take("fullatt_block_indexes", list, [7, 15, 23, 31]))
    attention = vision_attention(fields, width, num_heads)
    mlp = MlpSpec(
        width=fields.take("intermediate_size", int, 3420),
        activation=fields.activation("hidden_act", "silu"),
        gated=True,
        bias=True,
    )
    vision = VisionSpec(
        width=width,
        num_channels=channels,
        patch_size=patch,
        grids=_grids(choices, merge, window),
        layers=tuple(
            LayerSpec(
                mixer="attention" if index in full else "window_attention",
                attention=attention,
                mlp=mlp,
                norm1=VISION_NORM,
                norm2=VISION_NORM,
            )
            for index in range(depth)
        ),
        position="rotary",
        feature_layers=(depth,),
        pixels="patches",
        temporal_patch_size=fields.take("temporal_patch_size", int, 2),
        merge=merge,
        window=window,
        rotary_theta=theta,
    )
    fields.finish()
    return vision


def _grids(choices: ImageChoices, merge: int, window: int) -> tuple[tuple[int, int], ...]:
    """The patch grids to build for.

    Weights have no grid, so one window stands for them where none is chosen; the image spec, which
    says what pictures become, demands a choice.
    """
    if not choices.grids:
        return ((window, window),)
    for height, width in choices.grids:
        if height % merge or width % merge or min(height, width) < merge:
            raise ModelError(
                f"a grid of {height} x {width} patches does not divide into squares of "
                f"{merge} x {merge}",
                hint=f"choose multiples of {merge}",
            )
    return choices.grids


def _check_patches(files: Mapping[str, bytes], vision: VisionSpec) -> None:
    """The processor, where there is one, must cut the patches that the encoder reads."""
    if not {PROCESSOR, IMAGE_PROCESSOR} & files.keys():
        return
    values, file, where = image_processor(files)
    sizes = {
        "patch_size": (14, vision.patch_size),
        "temporal_patch_size": (2, vision.temporal_patch_size),
        "merge_size": (2, vision.merge),
    }
    for name, (default, ours) in sizes.items():
        found = values.get(name, default)
        if found != ours:
            raise ModelError(
                f"{file}: {where}{name} is {found}, the vision encoder's is {ours}",
                hint="take both files from the same checkpoint",
            )


def _sources(spec: VlmSpec) -> Iterable[tuple[str, Source]]:
    """Ours, and theirs relative to their sections."""
    vision = spec.vision
    # A convolution whose kernel is the patch is a linear map of the flattened patch.
    kernel = (vision.num_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    yield (
        "vision.embed.patch.weight",
        same("vision.patch_embed.proj.weight", shape=(vision.width, *kernel)),
    )
    for index, layer in enumerate(vision.layers):
        ours, theirs = f"vision.layers.{index}", f"vision.blocks.{index}"
        yield from layer_weights(ours, theirs, VISION_LAYER, layer, vision.width)
    yield from norm("projector.norm", "projector.ln_q", VISION_NORM)
    yield from linear("projector.up", "projector.mlp.0", bias=True)
    yield from linear("projector.down", "projector.mlp.2", bias=True)
    yield from decoder_weights(spec.decoder)
