"""Decoders: the text section of a config, of type llama, mistral, qwen2 or qwen2_5_vl_text.

A config leaves out what has its class's default, so the defaults of transformers are part of what a
checkpoint means.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.errors import ModelError
from edgevlm.families.fields import Fields
from edgevlm.families.rotary import rope_spec
from edgevlm.model.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, NormSpec

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDefaults:
    """What a text section of one type means where it says nothing."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    max_position_embeddings: int
    rms_norm_eps: float
    sliding_window: int | None = None
    rope_theta: float = 10000.0


DEFAULTS = {
    "llama": TextDefaults(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    ),
    "mistral": TextDefaults(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        sliding_window=4096,
    ),
    "qwen2": TextDefaults(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        sliding_window=4096,
    ),
    "qwen2_5_vl_text": TextDefaults(
        vocab_size=152064,
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=4096,
        rope_theta=1000000.0,
    ),
}


def decoder_spec(fields: Fields, kind: str, *, tied: bool) -> DecoderSpec:
    """Read a text section, all of it."""
    defaults = DEFAULTS[kind]
    width = fields.take("hidden_size", int, defaults.hidden_size)
    num_layers = fields.take("num_hidden_layers", int, defaults.num_hidden_layers)
    num_heads = fields.take("num_attention_heads", int, defaults.num_attention_heads)
    # Null means as many as query heads, absent means the class's default.
    default_kv = None if fields.is_null("num_key_value_heads") else defaults.num_key_value_heads
    num_kv_heads = fields.take("num_key_value_heads", int, default_kv or num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: {num_heads} attention heads do not share {num_kv_heads} key-value heads "
            "evenly",
            hint="take config.json from the checkpoint's own repository",
        )
    head_dim = width // num_heads
    if kind == "qwen2_5_vl_text":
        fields.only("head_dim", head_dim)
    else:
        head_dim = fields.take("head_dim", int, head_dim)
    max_positions = fields.take("max_position_embeddings", int, defaults.max_position_embeddings)
    qkv_bias, out_bias, mlp_bias = _biases(fields, kind)
    norm = NormSpec(kind="rms", eps=fields.take("rms_norm_eps", float, defaults.rms_norm_eps))
    mlp = MlpSpec(
        width=fields.take("intermediate_size", int, defaults.intermediate_size),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        gated=True,
        bias=mlp_bias,
    )
    layers = tuple(
        LayerSpec(
            mixer="attention",
            attention=AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                qkv_bias=qkv_bias,
                out_bias=out_bias,
                window=window,
            ),
            mlp=mlp,
            norm1=norm,
            norm2=norm,
        )
        for window in _windows(fields, kind, num_layers)
    )
    decoder = DecoderSpec(
        width=width,
        vocab_size=fields.take("vocab_size", int, defaults.vocab_size),
        layers=layers,
        norm=norm,
        tied=tied,
        rope=rope_spec(
            fields,
            head_dim=head_dim,
            max_positions=max_positions,
            theta=defaults.rope_theta,
            sections=kind == "qwen2_5_vl_text",
        ),
        max_positions=max_positions,
    )
    fields.finish()
    return decoder


def _biases(fields: Fields, kind: str) -> tuple[bool, bool, bool]:
    """Whether q|k|v, the projection after attention, and the MLP have biases."""
    if kind == "llama":
        attention = fields.take("attention_bias", bool, False)
        return attention, attention, fields.take("mlp_bias", bool, False)
    qkv = kind != "mistral"
    fields.only("attention_bias", qkv)
    fields.only("mlp_bias", False)
    return qkv, False, False


def _windows(fields: Fields, kind: str, num_layers: int) -> list[int | None]:
    """How many rows a row of each layer sees; None is all of them."""
    if kind == "llama":
        return [None] * num_layers
    default = None if fields.is_null("sliding_window") else DEFAULTS[kind].sliding_window
    window = fields.maybe("sliding_window", int) or default
    if kind == "mistral":
        return [window] * num_layers
    first = fields.take("max_window_layers", int, {"qwen2": 28}.get(kind, 80))
    if not fields.take("use_sliding_window", bool, False):
        window = None
    kinds = fields.maybe("layer_types", list) or [
        "sliding_attention" if window is not None and index >= first else "full_attention"
        for index in range(num_layers)
    ]
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"config.json: layer_types is {kinds!r}, expected {num_layers} of 'full_attention' "
            "and 'sliding_attention'",
            hint="take config.json from the checkpoint's own repository",
        )
    if window is None and "sliding_attention" in kinds:
        raise ModelError(
            "config.json: layer_types has 'sliding_attention', and there is no sliding window",
            hint="set sliding_window and use_sliding_window, or make these layers full",
        )
    return [window if name == "sliding_attention" else None for name in kinds]
