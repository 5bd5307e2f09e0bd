"""The decoder of a checkpoint as a Llama checkpoint of its own, which engines of text models take.

Same weights, same tokenizer, no pictures: what onnxruntime-genai and llama.cpp are measured with.
Usage:

    python benchmarks/peers/llama_checkpoint.py recipes/models/smolvlm-500m-shape build/llama-362m
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from edgevlm.checkpoint import open_checkpoint
from edgevlm.evidence.referee import reference_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    """Write the folder that is asked for."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("folder", type=Path)
    arguments = options.parse_args()
    write_llama(arguments.checkpoint, arguments.folder)


def write_llama(checkpoint: Path, folder: Path) -> None:
    """Write the decoder in float32 as `LlamaForCausalLM`, with the checkpoint's tokenizer.

    Raises ValueError where the decoder is not a Llama.
    """
    opened = open_checkpoint(str(checkpoint))
    spec = opened.architecture()
    model = reference_model(opened, spec)
    config = model.config.get_text_config()
    if config.model_type != "llama":
        raise ValueError(f"the decoder of {checkpoint} is a {config.model_type!r}, not a 'llama'")
    config.architectures = ["LlamaForCausalLM"]
    config.tie_word_embeddings = spec.decoder.tied
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    weights = {f"model.{name}": value for name, value in model.get_decoder().state_dict().items()}
    weights["lm_head.weight"] = model.get_output_embeddings().weight
    llama.load_state_dict(weights, assign=True)
    llama.tie_weights()
    llama.generation_config = model.generation_config
    llama.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(opened.folder / name, folder / name)


if __name__ == "__main__":
    main()
