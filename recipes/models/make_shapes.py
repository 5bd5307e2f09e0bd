"""Writes the checkpoints of seeded random weights: a shape, a tokenizer and a processor each.

    python recipes/models/make_shapes.py

`smolvlm-500m-shape` has the sizes of SmolVLM-500M and its vocabulary of 49,280 tokens, so that
every cost is there; `qwen2_5-vl-tiny` is small and has all that is special about Qwen2.5-VL.
`llava-1.5-7b-shape` is LLaVA-1.5-7B, by which papers on visual tokens count, and
`clip-l-362m-shape` its encoder before a decoder that a small board runs. Their tokenizers are
byte-level BPE, trained here on made-up words. The same files come out each time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
SEED = 0

SMOLVLM_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]
SMOLVLM_TEMPLATE = (
    "<|im_start|>"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

QWEN_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAVA_TOKENS = ["<s>", "</s>", "<unk>", "<image>", "<pad>"]
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LLAMA_362M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}


def main() -> None:
    """Write all folders."""
    write_smolvlm(HERE / "smolvlm-500m-shape")
    write_qwen(HERE / "qwen2_5-vl-tiny")
    write_llava(HERE / "llava-1.5-7b-shape", LLAMA_7B, tied=False)
    write_llava(HERE / "clip-l-362m-shape", LLAMA_362M, tied=True)


def write_smolvlm(folder: Path) -> None:
    """SigLIP-B/16 at 512, pixel shuffle by 4, and a Llama of 362 M parameters."""
    ids = write_tokenizer(
        folder,
        49280,
        SMOLVLM_TOKENS,
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        chat_template=SMOLVLM_TEMPLATE,
        model_max_length=8192,
    )
    eos, pad = ids["<end_of_utterance>"], ids["<|im_end|>"]
    write(
        folder / "config.json",
        {
            "architectures": ["Idefics3ForConditionalGeneration"],
            "model_type": "idefics3",
            "image_token_id": ids["<image>"],
            "scale_factor": 4,
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "llama",
                "vocab_size": 49280,
                "hidden_size": 960,
                "intermediate_size": 2560,
                "num_hidden_layers": 32,
                "num_attention_heads": 15,
                "num_key_value_heads": 5,
                "head_dim": 64,
                "hidden_act": "silu",
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
                "bos_token_id": ids["<|im_start|>"],
                "eos_token_id": eos,
                "pad_token_id": pad,
            },
            "vision_config": {
                "model_type": "idefics3_vision",
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "num_channels": 3,
                "image_size": 512,
                "patch_size": 16,
                "hidden_act": "gelu_pytorch_tanh",
                "layer_norm_eps": 1e-6,
            },
        },
    )
    write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Idefics3ImageProcessor",
            "do_convert_rgb": True,
            "do_image_splitting": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "max_image_size": {"longest_edge": 512},
            "resample": 1,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": 2048},
        },
    )
    write(
        folder / "processor_config.json",
        {"image_seq_len": 64, "processor_class": "Idefics3Processor"},
    )
    write_generation(folder, eos, pad)


def write_qwen(folder: Path) -> None:
    """Four layers each: windows of 8 x 8 patches, two layers that see all, M-RoPE."""
    ids = write_tokenizer(
        folder,
        2048,
        QWEN_TOKENS,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=QWEN_TEMPLATE,
        model_max_length=4096,
    )
    eos, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    write(
        folder / "config.json",
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "qwen2_5_vl_text",
                "vocab_size": 2048,
                "hidden_size": 192,
                "intermediate_size": 448,
                "num_hidden_layers": 4,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "hidden_act": "silu",
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-6,
                "use_sliding_window": False,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1000000.0,
                    "mrope_section": [4, 6, 6],
                },
                "bos_token_id": pad,
                "eos_token_id": eos,
                "pad_token_id": pad,
            },
            "vision_config": {
                "model_type": "qwen2_5_vl_vision",
                "depth": 4,
                "hidden_size": 128,
                "intermediate_size": 320,
                "num_heads": 4,
                "in_channels": 3,
                "hidden_act": "silu",
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": [1, 3],
                "out_hidden_size": 192,
                "tokens_per_second": 2,
            },
        },
    )
    write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "max_pixels": 1003520,
            "merge_size": 2,
            "min_pixels": 3136,
            "patch_size": 14,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "temporal_patch_size": 2,
        },
    )
    write_generation(folder, eos, pad)


def write_llava(folder: Path, decoder: dict[str, Any], *, tied: bool) -> None:
    """CLIP ViT-L/14 at 336, whose last layer but one gives 576 tokens, an MLP, and a decoder."""
    ids = write_tokenizer(
        folder,
        decoder["vocab_size"],
        LLAVA_TOKENS,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=LLAVA_TEMPLATE,
        model_max_length=decoder["max_position_embeddings"],
    )
    eos, pad = ids["</s>"], ids["<pad>"]
    special = {"bos_token_id": ids["<s>"], "eos_token_id": eos, "pad_token_id": pad}
    write(
        folder / "config.json",
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": ids["<image>"],
            "image_seq_length": 576,
            "multimodal_projector_bias": True,
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": tied,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "text_config": {**decoder, **special},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_channels": 3,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5,
            },
        },
    )
    write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": 336, "width": 336},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": 336},
        },
    )
    write(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
    write_generation(folder, eos, pad)


def write_tokenizer(folder: Path, size: int, specials: list[str], **named: Any) -> dict[str, int]:
    """Train a byte-level BPE of exactly `size` tokens, save it, and return the specials' ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words(), trainer)
    tokenizer.add_special_tokens(specials)
    assert tokenizer.get_vocab_size() == size
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named
    ).save_pretrained(folder)
    # Without indentation: two thirds of the size.
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
    return {token: tokenizer.token_to_id(token) for token in specials}


def words() -> Iterator[str]:
    """Made-up words of two or three syllables, each alone and after a space."""
    syllables = ["".join(parts) for parts in itertools.product("bcdfghklmnprstvwz", "aeiou")]
    endings = ["", "n", "r", "s", "t"]
    for first, second, ending in itertools.product(syllables, syllables, endings):
        yield f"{first}{second}{ending} {second}{first}{ending}"
    for first, ending in itertools.product(syllables, endings):
        yield f" {first}{ending} {first}{first}{ending}"


def write_generation(folder: Path, eos: int, pad: int) -> None:
    """Greedy until the end of the turn, and weights from the seed."""
    write(folder / "generation_config.json", {"eos_token_id": eos, "pad_token_id": pad})
    write(folder / "random_weights.json", {"seed": SEED})


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON for people to read."""
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
