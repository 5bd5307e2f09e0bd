"""Vision encoders with a table of positions: CLIP, SigLIP, and Idefics3's SigLIP."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgevlm.families.fields import Fields
from edgevlm.families.weights import LayerNames, Source, layer_weights, linear, norm, same
from edgevlm.model.spec import AttentionSpec, LayerSpec, MlpSpec, NormSpec, VisionSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderKind:
    """What sets one encoder apart, and what its section means where it says nothing."""

    position: str
    class_token: bool
    pre_norm: bool
    patch_bias: bool
    hidden_size: int
    num_attention_heads: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float


CLIP = EncoderKind(
    position="learned",
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    hidden_size=768,
    num_attention_heads=12,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
SIGLIP = EncoderKind(
    position="learned",
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    hidden_size=768,
    num_attention_heads=12,
    patch_size=16,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
IDEFICS3 = EncoderKind(
    position="bucketed",
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    hidden_size=1152,
    num_attention_heads=16,
    patch_size=32,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)


LAYER = LayerNames(
    norm1="layer_norm1",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    norm2="layer_norm2",
    mlp={"up": "mlp.fc1", "down": "mlp.fc2"},
)


def encoder_spec(
    fields: Fields,
    kind: EncoderKind,
    *,
    features: tuple[int, ...],
    drop_first_row: bool,
    post_norm: bool,
) -> VisionSpec:
    """Read a vision section, all of it.

    `features` are hidden states counted as transformers does, from the front or (negative) from the
    back; layers after the last of them are left out. `post_norm` is a norm after the last layer.
    """
    width = fields.take("hidden_size", int, kind.hidden_size)
    num_layers = fields.take("num_hidden_layers", int, 12)
    num_heads = fields.take("num_attention_heads", int, kind.num_attention_heads)
    for index in features:
        if not -num_layers - 1 <= index <= num_layers:
            raise fields.error(
                f"vision_feature_layer is {index}, and the encoder has {num_layers} layers"
            )
    states = tuple(index % (num_layers + 1) for index in features)
    image_size = fields.take("image_size", int, 224)
    patch_size = fields.take("patch_size", int, kind.patch_size)
    side = image_size // patch_size
    norm_spec = NormSpec(
        kind="layer", eps=fields.take("layer_norm_eps", float, kind.layer_norm_eps)
    )
    layer = LayerSpec(
        mixer="attention",
        attention=vision_attention(fields, width, num_heads),
        mlp=MlpSpec(
            width=fields.take("intermediate_size", int, 3072),
            activation=fields.activation("hidden_act", kind.hidden_act),
            gated=False,
            bias=True,
        ),
        norm1=norm_spec,
        norm2=norm_spec,
    )
    spec = VisionSpec(
        width=width,
        num_channels=fields.take("num_channels", int, 3),
        patch_size=patch_size,
        grids=((side, side),),
        image_size=image_size if image_size % patch_size else None,
        layers=(layer,) * max(states),
        position=kind.position,
        feature_layers=states,
        patch_bias=kind.patch_bias,
        class_token=kind.class_token,
        drop_first_row=drop_first_row,
        pre_norm=norm_spec if kind.pre_norm else None,
        norm=norm_spec if post_norm else None,
    )
    fields.finish()
    return spec


def vision_attention(fields: Fields, width: int, num_heads: int) -> AttentionSpec:
    """Attention as all vision encoders here have it: heads fill the width, maps have biases."""
    if width % num_heads:
        raise fields.error(f"vision width {width} is not a multiple of {num_heads} heads")
    head_dim = width // num_heads
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        qkv_bias=True,
        out_bias=True,
    )


def encoder_weights(spec: VisionSpec) -> Iterable[tuple[str, Source]]:
    """Our weights, and theirs relative to the section `vision`."""
    yield from linear(
        "vision.embed.patch", "vision.embeddings.patch_embedding", bias=spec.patch_bias
    )
    if spec.class_token:
        yield "vision.embed.class_token", same("vision.embeddings.class_embedding")
    yield from linear("vision.embed.position", "vision.embeddings.position_embedding", bias=False)
    if spec.pre_norm:
        # Their spelling.
        yield from norm("vision.pre_norm", "vision.pre_layrnorm", spec.pre_norm)
    for index, layer in enumerate(spec.layers):
        ours, theirs = f"vision.layers.{index}", f"vision.encoder.layers.{index}"
        yield from layer_weights(ours, theirs, LAYER, layer, spec.width)
    if spec.norm:
        yield from norm("vision.norm", "vision.post_layernorm", spec.norm)
