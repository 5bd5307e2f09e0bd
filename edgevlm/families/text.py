"""Decoders: the text section of a config, of type llama, mistral, qwen2 or qwen2_5_vl_text.

A config leaves out what has its class's default, so the defaults of transformers are part of what a
checkpoint means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from edgevlm.errors import ModelError
from edgevlm.families.fields import Fields
from edgevlm.families.rotary import rope_spec
from edgevlm.families.weights import LayerNames, Source, layer_weights, norm, same
from edgevlm.model.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, NormSpec

LAYER = LayerNames(
    norm1="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    norm2="post_attention_layernorm",
    mlp={"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
)
# Names of rotary frequencies, which old checkpoints hold and nobody needs.
ROTARY_TABLES = r"text\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextKind:
    """What a text section of one type means where it says nothing.

    Layers from `max_window_layers` on have the window, if `use_sliding_window` is set; where this
    is None they all have it. `has_mrope` is rotation by three positions, with the head size that
    follows from the width.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    max_position_embeddings: int
    rms_norm_eps: float
    sliding_window: int | None = None
    max_window_layers: int | None = None
    rope_theta: float = 10000.0
    has_mrope: bool = False


KINDS = {
    "llama": TextKind(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    ),
    "mistral": TextKind(
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
    "qwen2": TextKind(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        sliding_window=4096,
        max_window_layers=28,
    ),
    "qwen2_5_vl_text": TextKind(
        vocab_size=152064,
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=4096,
        max_window_layers=80,
        rope_theta=1000000.0,
        has_mrope=True,
    ),
}


def decoder_spec(fields: Fields, model_type: str, *, tied: bool) -> DecoderSpec:
    """Read a text section, all of it; `tied` makes the embedding the head."""
    kind = KINDS[model_type]
    width = fields.take("hidden_size", int, kind.hidden_size)
    max_positions = fields.take("max_position_embeddings", int, kind.max_position_embeddings)
    norm_spec = NormSpec(kind="rms", eps=fields.take("rms_norm_eps", float, kind.rms_norm_eps))
    qkv_bias, out_bias, mlp_bias = _biases(fields, model_type)
    num_heads, num_kv_heads, head_dim = _heads(fields, kind, width)
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
    )
    mlp = MlpSpec(
        width=fields.take("intermediate_size", int, kind.intermediate_size),
        activation=fields.activation("hidden_act", "silu"),
        gated=True,
        bias=mlp_bias,
    )
    decoder = DecoderSpec(
        width=width,
        vocab_size=fields.take("vocab_size", int, kind.vocab_size),
        layers=tuple(
            LayerSpec(
                mixer="attention",
                attention=replace(attention, window=window),
                mlp=mlp,
                norm1=norm_spec,
                norm2=norm_spec,
            )
            for window in _windows(fields, kind)
        ),
        norm=norm_spec,
        tied=tied,
        rope=rope_spec(
            fields,
            head_dim=head_dim,
            max_positions=max_positions,
            theta=kind.rope_theta,
            has_mrope=kind.has_mrope,
        ),
        max_positions=max_positions,
    )
    fields.finish()
    return decoder


def decoder_weights(spec: DecoderSpec) -> Iterable[tuple[str, Source]]:
    """The embedding, the decoder, and its head; theirs relative to the sections `text`, `head`."""
    yield "embedding.weight", same("text.embed_tokens.weight")
    for index, layer in enumerate(spec.layers):
        ours, theirs = f"decoder.layers.{index}", f"text.layers.{index}"
        yield from layer_weights(ours, theirs, LAYER, layer, spec.width)
    yield from norm("decoder.norm", "text.norm", spec.norm)
    if not spec.tied:
        yield "decoder.head.weight", same("head.weight")


def head_copies(spec: DecoderSpec) -> Mapping[str, str]:
    """A head that is the embedding, and was saved all the same."""
    return {"head.weight": "embedding.weight"} if spec.tied else {}


def _heads(fields: Fields, kind: TextKind, width: int) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the size of one."""
    num_heads = fields.take("num_attention_heads", int, kind.num_attention_heads)
    # Null means as many as query heads, absent means the class's default.
    default = None if fields.is_null("num_key_value_heads") else kind.num_key_value_heads
    num_kv_heads = fields.take("num_key_value_heads", int, default or num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            f"{num_heads} attention heads do not share {num_kv_heads} key-value heads evenly"
        )
    head_dim = width // num_heads
    if kind.has_mrope:
        fields.only("head_dim", head_dim)
        return num_heads, num_kv_heads, head_dim
    return num_heads, num_kv_heads, fields.take("head_dim", int, head_dim)


def _biases(fields: Fields, model_type: str) -> tuple[bool, bool, bool]:
    """Whether q|k|v, the projection after attention, and the MLP have biases."""
    if model_type == "llama":
        attention = fields.take("attention_bias", bool, False)
        return attention, attention, fields.take("mlp_bias", bool, False)
    qkv = model_type != "mistral"
    fields.only("attention_bias", qkv)
    fields.only("mlp_bias", False)
    return qkv, False, False


def _windows(fields: Fields, kind: TextKind) -> list[int | None]:
    """How many rows a row of each layer sees; None is all of them."""
    num_layers = fields.take("num_hidden_layers", int, kind.num_hidden_layers)
    if kind.sliding_window is None:
        return [None] * num_layers
    default = None if fields.is_null("sliding_window") else kind.sliding_window
    window = fields.maybe("sliding_window", int) or default
    if kind.max_window_layers is None:
        return [window] * num_layers
    first = fields.take("max_window_layers", int, kind.max_window_layers)
    if not fields.take("use_sliding_window", bool, False):
        window = None
    layer_types = fields.maybe("layer_types", list) or [
        "sliding_attention" if window is not None and index >= first else "full_attention"
        for index in range(num_layers)
    ]
    known = {"full_attention", "sliding_attention"}
    if len(layer_types) != num_layers or not set(layer_types) <= known:
        raise fields.error(
            f"layer_types is {layer_types!r}, expected {num_layers} of 'full_attention' and "
            "'sliding_attention'"
        )
    if window is None and "sliding_attention" in layer_types:
        raise ModelError(
            "config.json: layer_types has 'sliding_attention', and there is no sliding window",
            hint="set sliding_window and use_sliding_window, or make these layers full",
        )
    return [window if name == "sliding_attention" else None for name in layer_types]
