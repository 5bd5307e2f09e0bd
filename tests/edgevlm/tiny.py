"""Small models for tests: specs made by hand, weights drawn from a seed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from edgevlm.model.spec import (
    AttentionSpec,
    DecoderSpec,
    GenerationSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    ProjectorSpec,
    RopeSpec,
    VisionSpec,
    VlmSpec,
)
from edgevlm_runtime.images.spec import FixedGeometry, ImageSpec

if TYPE_CHECKING:
    from edgevlm.model.vlm import Vlm

LAYER_NORM = NormSpec(kind="layer", eps=1e-5)
RMS_NORM = NormSpec(kind="rms", eps=1e-5)


def tiny_spec(*, tied: bool = True, vision_bias: bool = True, head_norms: bool = False) -> VlmSpec:
    """A LLaVA of two layers each: 4 x 4 patches and a class token, 32 wide, 64 tokens."""
    vision_layer = LayerSpec(
        mixer="attention",
        attention=AttentionSpec(
            num_heads=2,
            num_kv_heads=2,
            head_dim=16,
            scale=0.25,
            qkv_bias=vision_bias,
            out_bias=True,
        ),
        mlp=MlpSpec(width=48, activation="quick_gelu", gated=False, bias=vision_bias),
        norm1=LAYER_NORM,
        norm2=LAYER_NORM,
    )
    head_norm = RMS_NORM if head_norms else None
    decoder_layer = LayerSpec(
        mixer="attention",
        attention=AttentionSpec(
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            scale=0.25,
            qkv_bias=False,
            out_bias=False,
            q_norm=head_norm,
            k_norm=head_norm,
        ),
        mlp=MlpSpec(width=80, activation="silu", gated=True, bias=False),
        norm1=RMS_NORM,
        norm2=RMS_NORM,
    )
    image = ImageSpec(
        geometry=FixedGeometry(size=(32, 32)),
        resample="bicubic",
        rescale=1 / 255,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        tokens=(16,),
    )
    return VlmSpec(
        family="llava",
        vision=VisionSpec(
            width=32,
            num_channels=3,
            patch_size=8,
            grids=((4, 4),),
            layers=(vision_layer, vision_layer),
            position="learned",
            feature_layers=(1,),
            class_token=True,
            drop_first_row=True,
            pre_norm=LAYER_NORM,
        ),
        projector=ProjectorSpec(
            kind="mlp", in_width=32, hidden_width=64, out_width=64, activation="gelu", bias=True
        ),
        decoder=DecoderSpec(
            width=64,
            vocab_size=96,
            layers=(decoder_layer, decoder_layer),
            norm=RMS_NORM,
            tied=tied,
            rope=RopeSpec(inv_freq=tuple(10000.0 ** (-i / 8) for i in range(8))),
            max_positions=256,
        ),
        image_token_id=90,
        image=image.to_json(),
        generation=GenerationSpec(eos_token_ids=(2,), max_new_tokens=16),
    )


def native_spec(*grids: tuple[int, int]) -> VlmSpec:
    """The same with pictures of any shape, as flattened patches in squares of 2 x 2."""
    spec = tiny_spec()
    return dataclasses.replace(
        spec,
        family="qwen2_5_vl",
        vision=dataclasses.replace(
            spec.vision,
            grids=grids,
            pixels="patches",
            position="rotary",
            class_token=False,
            drop_first_row=False,
            pre_norm=None,
            merge=2,
            window=4,
            temporal_patch_size=2,
        ),
        projector=ProjectorSpec(
            kind="patch_merger",
            in_width=32,
            hidden_width=128,
            out_width=64,
            activation="gelu",
            bias=True,
            merge=2,
            norm=RMS_NORM,
        ),
    )


def drawn(spec: VlmSpec, seed: int = 0) -> Vlm:
    """The model of a spec; norms have weights far from one, and biases far from zero."""
    import torch

    from edgevlm.model.vlm import Vlm

    generator = torch.Generator().manual_seed(seed)
    model = Vlm(spec).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1.0 + 0.5 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise * weight[0].numel() ** -0.5)
    return model
