"""The referee: our model against transformers' own class, on a random config that means something.

A random model of small weights answers the same whatever it sees, and any mistake passes. So the
referee first demands that the logits of transformers' model have a deviation above 1, that its
greedy answer has at least 8 different tokens in 32, and that another picture changes the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgevlm.checkpoint import load, open_checkpoint
from edgevlm.families.image_spec import ImageChoices
from edgevlm.model.vlm import Vlm

NUM_STEPS = 32


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt for both: token ids with image tokens in place, a picture, and what HF wants."""

    token_ids: Tensor
    pixels: Tensor
    theirs: Mapping[str, Tensor]
    positions: Tensor
    grid: tuple[int, int] | None = None


def randomise(model: PreTrainedModel, seed: int, gain: float = 2.0) -> PreTrainedModel:
    """Weights that make a model with opinions: maps keep sizes, the head is loud."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            value = torch.randn(weight.shape, generator=generator)
            if "norm" in name or "ln_q" in name or weight.dim() == 1:
                centre = 1.0 if ("norm" in name or "ln_q" in name) and "weight" in name else 0.0
                weight.copy_(value * 0.2 + centre)
            elif "lm_head" in name or ("embed_tokens" in name and tied(model)):
                weight.copy_(value * 4.0 * weight.shape[1] ** -0.5)
            elif "embed" in name and "patch" not in name:
                weight.copy_(value)
            else:
                weight.copy_(value * gain * weight[0].numel() ** -0.5)
    return model.eval()


def tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def saved_and_loaded(
    model: PreTrainedModel, folder: Path, choices: ImageChoices | None = None
) -> Vlm:
    """Our model of what transformers saves."""
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    return load(checkpoint, checkpoint.architecture(choices))


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Prompt) -> tuple[Tensor, list[int]]:
    """Transformers' logits of the prompt [T, V], and its greedy answer."""
    inputs = {"input_ids": prompt.token_ids[None], **prompt.theirs}
    logits = model(**inputs).logits[0]
    generated = model.generate(
        **inputs,
        attention_mask=torch.ones_like(prompt.token_ids[None]),
        max_new_tokens=NUM_STEPS,
        min_new_tokens=NUM_STEPS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return logits, generated[0, len(prompt.token_ids) :].tolist()


@torch.no_grad()
def check(theirs: PreTrainedModel, ours: Vlm, prompt: Prompt, other: Prompt) -> None:
    """Equal logits over the prompt and equal greedy tokens, on a model worth comparing."""
    reference, answer = greedy(theirs, prompt)
    assert reference.std() > 1.0
    assert len(set(answer)) >= 8
    assert greedy(theirs, other)[1] != answer

    image_rows = ours.encode(prompt.pixels, prompt.grid).flatten(0, 1)
    rows = ours.embed(prompt.token_ids, image_rows)
    logits = ours(rows, prompt.positions)[0]
    # Float32 sums in another order: some 1e-6 of the largest logits, with room for depth.
    allowed = 1e-4 * max(1.0, float(reference.std()))
    assert (logits - reference).abs().max() <= allowed

    stream = ours.greedy(rows, prompt.positions)
    assert [token for (token, _), _ in zip(stream, range(NUM_STEPS), strict=False)] == answer
