"""The referee: our model against transformers' own class, on a random config that means something.

A random model of small weights answers the same whatever it sees, and any mistake passes. So the
referee first demands that the logits of transformers' model have a deviation above 1, that its
greedy answer has at least 8 different tokens in 32, and that another picture changes the answer:
random weights are drawn anew until they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgevlm.checkpoint import load, open_checkpoint
from edgevlm.families.image_spec import ImageChoices
from edgevlm.model.loading import reference_weights
from edgevlm.model.vlm import Vlm

NUM_STEPS = 32
NUM_SEEDS = 20
# Louder maps make livelier answers and blow up the rounding errors of both sides.
GAIN = 1.6


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt for both: token ids with image tokens in place, a picture, and what HF wants."""

    token_ids: Tensor
    pixels: Tensor
    theirs: Mapping[str, Tensor]
    positions: Tensor
    grid: tuple[int, int] | None = None


Pair = tuple[Prompt, Prompt]


def worthy(model: PreTrainedModel, pairs: Sequence[Pair]) -> PreTrainedModel:
    """The model with the first random weights that make it worth comparing.

    Each pair is a prompt, and the same prompt with another picture.
    """
    for seed in range(NUM_SEEDS):
        randomise(model, seed)
        if all(is_worthy(model, *pair) for pair in pairs):
            return model
    raise AssertionError(f"none of {NUM_SEEDS} seeds makes a model worth comparing")


@torch.no_grad()
def is_worthy(model: PreTrainedModel, prompt: Prompt, other: Prompt) -> bool:
    """Whether a mistake could show: lively logits, a varied answer, and eyes for the picture."""
    answer = greedy(model, prompt)
    return (
        len(set(answer)) >= 8
        and greedy(model, other) != answer
        and float(reference_logits(model, prompt).std()) > 1.0
    )


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights of a size that a trained model might have, and a loud head."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.eval().named_parameters():
            value = torch.randn(weight.shape, generator=generator)
            if "norm" in name or "ln_q" in name or weight.dim() == 1:
                centre = 1.0 if ("norm" in name or "ln_q" in name) and "weight" in name else 0.0
                weight.copy_(value * 0.2 + centre)
            elif "lm_head" in name or ("embed_tokens" in name and tied(model)):
                weight.copy_(value * 3.0 * weight.shape[1] ** -0.5)
            elif "embed" in name and "patch" not in name:
                weight.copy_(value)
            else:
                weight.copy_(value * GAIN * weight[0].numel() ** -0.5)


def tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def saved_and_loaded(
    model: PreTrainedModel, folder: Path, choices: ImageChoices | None = None
) -> Vlm:
    """Our model of what transformers saves; its weights go back as they came."""
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    ours = load(checkpoint, checkpoint.architecture(choices))
    theirs = model.state_dict()
    for name, tensor in reference_weights(ours, checkpoint.family.weights(ours.spec)):
        assert torch.equal(tensor, theirs[name]), name
    return ours


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Prompt) -> list[int]:
    """Transformers' greedy answer."""
    generated = model.generate(
        input_ids=prompt.token_ids[None],
        **prompt.theirs,
        attention_mask=torch.ones_like(prompt.token_ids[None]),
        max_new_tokens=NUM_STEPS,
        min_new_tokens=NUM_STEPS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    answer: list[int] = generated[0, len(prompt.token_ids) :].tolist()
    return answer


@torch.no_grad()
def reference_logits(model: PreTrainedModel, prompt: Prompt) -> Tensor:
    """Transformers' logits of the prompt [T, V]."""
    logits: Tensor = model(input_ids=prompt.token_ids[None], **prompt.theirs).logits[0]
    return logits


@torch.no_grad()
def check(theirs: PreTrainedModel, ours: Vlm, prompt: Prompt) -> None:
    """Equal logits over the prompt, and equal greedy tokens."""
    reference = reference_logits(theirs, prompt)
    image_rows = ours.encode(prompt.pixels, prompt.grid).flatten(0, 1)
    rows = ours.embed(prompt.token_ids, image_rows)
    logits = ours(rows, prompt.positions)[0]
    # Float32 sums in another order, through a few layers: 1e-5 is usual.
    allowed = 1e-4 * max(1.0, float(reference.std()))
    assert (logits - reference).abs().max() <= allowed

    stream = ours.greedy(rows, prompt.positions)
    answer = [token for (token, _), _ in zip(stream, range(NUM_STEPS), strict=False)]
    assert answer == greedy(theirs, prompt)
