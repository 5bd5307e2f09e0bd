"""Tiny specs for tests of model code: a decoder with everything odd, and two encoders."""

from __future__ import annotations

from edgevlm.model.drawing import draw_weights
from edgevlm.model.spec import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    ProjectorSpec,
    RopeSpec,
    VisionSpec,
    VlmSpec,
)
from edgevlm.model.vlm import Vlm

LAYER_NORM = NormSpec(kind="layer", eps=1e-6)
RMS_NORM = NormSpec(kind="rms", eps=1e-6)


def attention(*, window: int | None = None, head_norm: NormSpec | None = None) -> AttentionSpec:
    """Four query heads on two, of a size that is not width / heads."""
    return AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        scale=12**-0.5,
        qkv_bias=True,
        out_bias=False,
        q_norm=head_norm,
        k_norm=head_norm,
        window=window,
    )


def decoder(*layers: AttentionSpec, tied: bool = False) -> DecoderSpec:
    """A decoder of width 32; rotary turns 8 of 12 features."""
    mlp = MlpSpec(width=40, activation="silu", gated=True, bias=False)
    return DecoderSpec(
        width=32,
        vocab_size=50,
        layers=tuple(
            LayerSpec(mixer="attention", attention=spec, mlp=mlp, norm1=RMS_NORM, norm2=RMS_NORM)
            for spec in layers
        ),
        norm=RMS_NORM,
        tied=tied,
        rope=RopeSpec(inv_freq=(1.0, 0.3, 0.1, 0.03)),
        max_positions=64,
    )


def vision() -> VisionSpec:
    """A ViT of 4 x 4 patches with a class token that is dropped."""
    spec = AttentionSpec(
        num_heads=2, num_kv_heads=2, head_dim=8, scale=8**-0.5, qkv_bias=True, out_bias=True
    )
    mlp = MlpSpec(width=24, activation="gelu", gated=False, bias=True)
    layer = LayerSpec(
        mixer="attention", attention=spec, mlp=mlp, norm1=LAYER_NORM, norm2=LAYER_NORM
    )
    return VisionSpec(
        width=16,
        num_channels=3,
        patch_size=4,
        grids=((4, 4),),
        layers=(layer, layer),
        position="learned",
        feature_layers=(2,),
        class_token=True,
        drop_first_row=True,
        pre_norm=LAYER_NORM,
    )


def vlm_spec(decoder: DecoderSpec, vision: VisionSpec) -> VlmSpec:
    """The parts with an MLP between them."""
    return VlmSpec(
        family="tiny",
        vision=vision,
        projector=ProjectorSpec(
            kind="mlp",
            in_width=vision.out_width,
            hidden_width=32,
            out_width=32,
            activation="gelu",
            bias=True,
        ),
        decoder=decoder,
        image_token_id=49,
    )


def drawn(spec: VlmSpec, seed: int = 0) -> Vlm:
    """A model of the spec with seeded weights."""
    model = Vlm(spec)
    draw_weights(model, seed)
    return model.eval()
