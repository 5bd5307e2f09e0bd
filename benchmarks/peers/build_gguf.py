"""llama.cpp's Q4_0 file of a Llama checkpoint, its tokenizer left out: tokens go in as numbers.

Every matrix is Q4_0 (groups of 32 with a float16 scale, as ours), the embedding included, which is
the head too; `--embedding q8_0` is what llama.cpp's own tool picks for rows of 960. Norms stay
float32. Runs in the peer's environment; the network is not needed. Usage:

    python benchmarks/peers/llama_checkpoint.py recipes/models/smolvlm-500m-shape build/llama-362m
    python -m venv build/llama-cpp-env
    build/llama-cpp-env/bin/pip install llama-cpp-python==0.3.36 gguf safetensors
    build/llama-cpp-env/bin/python benchmarks/peers/build_gguf.py build/llama-362m build/q4_0.gguf
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors import safe_open

# Names in a Llama checkpoint, and in GGUF.
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def main() -> None:
    """Write one file."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("checkpoint", type=Path)
    options.add_argument("file", type=Path)
    options.add_argument("--embedding", choices=("q4_0", "q8_0"), default="q4_0")
    arguments = options.parse_args()
    config = json.loads((arguments.checkpoint / "config.json").read_text())
    writer = GGUFWriter(arguments.file, "llama")
    write_sizes(writer, config)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    outer = GGMLQuantizationType[arguments.embedding.upper()]
    with safe_open(arguments.checkpoint / "model.safetensors", framework="numpy") as weights:
        for source in weights.keys():  # noqa: SIM118  # no mapping: it has no __iter__
            name = gguf_name(source)
            weight = weights.get_tensor(source)
            if weight.ndim == 1:
                writer.add_tensor(name, weight)
                continue
            kind = name.split(".")[-2]
            if kind in heads:
                weight = interleaved(weight, heads[kind])
            dtype = outer if kind in ("token_embd", "output") else GGMLQuantizationType.Q4_0
            writer.add_tensor(name, quants.quantize(weight, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_sizes(writer: GGUFWriter, config: dict) -> None:
    """What llama.cpp has to know of the architecture, and that there is no vocabulary."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def gguf_name(source: str) -> str:
    """The name of a weight of a Llama checkpoint in GGUF."""
    owner, _, kind = source.rpartition(".")
    if owner in OUTSIDE:
        return f"{OUTSIDE[owner]}.{kind}"
    layer, _, part = owner.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows [H * D, K] with rotary pairs side by side; a checkpoint has them half a head apart."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    main()
