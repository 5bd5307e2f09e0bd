"""The referee: the Hugging Face model of a checkpoint, in float32, which every rung answers to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgevlm.checkpoint import Checkpoint, load
from edgevlm.errors import ModelError
from edgevlm.evidence.witness import Question, Witness
from edgevlm.model.loading import reference_weights
from edgevlm.model.spec import VlmSpec

_Feeds = Sequence[Mapping[str, NDArray[Any]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Seams:
    """Where the parts of a Hugging Face class meet, and the form in which it takes pictures.

    `projector` is the module that reads the vision features, None where their rows are in another
    order than ours; `tokens` is the one that puts out the visual tokens. `typed` classes want to
    be told which prompt rows are visual.
    """

    projector: str | None
    tokens: str
    pictures: Callable[[_Feeds], dict[str, torch.Tensor]]
    typed: bool = False


def _stacked(feeds: _Feeds) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.from_numpy(np.concatenate([feed["pixels"] for feed in feeds]))}


def _tiles(feeds: _Feeds) -> dict[str, torch.Tensor]:
    return {"pixel_values": _stacked(feeds)["pixel_values"][None]}


def _native(feeds: _Feeds) -> dict[str, torch.Tensor]:
    grids = torch.from_numpy(np.concatenate([feed["grid"] for feed in feeds]))
    return {**_stacked(feeds), "image_grid_thw": grids}


_LLAVA, _IDEFICS = "model.multi_modal_projector", "model.connector"
SEAMS: dict[str, Seams] = {
    "llava": Seams(projector=_LLAVA, tokens=_LLAVA, pictures=_stacked),
    "idefics3": Seams(projector=_IDEFICS, tokens=_IDEFICS, pictures=_tiles),
    "smolvlm": Seams(projector=_IDEFICS, tokens=_IDEFICS, pictures=_tiles),
    # Patches are in the order of their windows from the first block to behind the merger.
    "qwen2_5_vl": Seams(projector=None, tokens="model.visual", pictures=_native, typed=True),
}


class Referee:
    """The Hugging Face model, answering questions greedily."""

    def __init__(self, checkpoint: Checkpoint, spec: VlmSpec) -> None:
        """Load the checkpoint's class from transformers, converted to float32."""
        self._seams = SEAMS[str(checkpoint.config["model_type"])]
        self.model: Any = reference_model(checkpoint, spec)
        self._image_token_id = spec.image_token_id

    @torch.inference_mode()
    def answer(self, question: Question, *, max_new_tokens: int) -> Witness:
        """Answer greedily, noting vision features, visual tokens, and the logits of every token."""
        features: list[torch.Tensor] = []
        tokens: list[torch.Tensor] = []
        handles = [
            self.model.get_submodule(self._seams.tokens).register_forward_hook(
                lambda _module, _inputs, output: tokens.append(_rows(output))
            )
        ]
        if self._seams.projector is not None:
            handles.append(
                self.model.get_submodule(self._seams.projector).register_forward_hook(
                    lambda _module, inputs, _output: features.append(inputs[0])
                )
            )
        try:
            output = self._run(self._inputs([question]), max_new_tokens)
        finally:
            for handle in handles:
                handle.remove()
        counts = [count for image in question.images for count in image.layout.tokens]
        visual = torch.cat(tokens).split(counts) if tokens else ()
        return Witness(
            vision=_per_call(features, len(counts)),
            projector=tuple(part.float().numpy() for part in visual),
            answer=tuple(output.sequences[0, question.prompt.token_ids.shape[0] :].tolist()),
            logits=torch.cat(output.logits).float().numpy(),
        )

    @torch.inference_mode()
    def forward(self, question: Question) -> None:
        """Run the prompt through the model once, for hooks to see."""
        self.model(**self._inputs([question]))

    @torch.inference_mode()
    def tokens(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[list[int]]:
        """Answer questions of equal length and equal numbers of pictures in one batch.

        Equal lengths need no padding, so every answer is the one that the question alone gets, up
        to the rounding of batched products. Answers end with, and include, the end token.
        """
        inputs = self._inputs(questions)
        sequences = self._run(inputs, max_new_tokens).sequences
        start = inputs["input_ids"].shape[1]
        ends = self._end_tokens()
        return [_until(sequence[start:].tolist(), ends) for sequence in sequences]

    def _inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": torch.from_numpy(np.stack([q.prompt.token_ids for q in questions]))}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if self._seams.typed:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self._image_token_id).int()
        feeds = [feed for question in questions for feed in question.feeds]
        return inputs | self._seams.pictures(feeds) if feeds else inputs

    def _run(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> Any:
        return self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )

    def _end_tokens(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())


def reference_model(checkpoint: Checkpoint, spec: VlmSpec) -> Any:
    """The checkpoint's class from transformers, in float32, on the CPU.

    A checkpoint whose weights are drawn has no file to load: the class gets views of the weights
    of our model of this spec. Raises ModelError where the weights are not those of the config.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    # Ours first: it refuses weights that are missing or broken, where transformers draws new ones.
    ours = load(checkpoint, spec)
    if checkpoint.seed is None:
        del ours
        return AutoModelForImageTextToText.from_pretrained(
            checkpoint.folder, dtype=torch.float32, local_files_only=True
        ).eval()
    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    weights = dict(reference_weights(ours, checkpoint.family.weights(spec)))
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        raise ModelError(
            f"{type(model).__name__} and {checkpoint.source} differ in the weight "
            f"{[*missing, *unexpected][0]!r}",
            hint="report this: a family's table of weight names is wrong",
        )
    model.tie_weights()
    _fill_buffers(model)
    if "generation_config.json" in checkpoint.files:
        model.generation_config = GenerationConfig.from_pretrained(
            checkpoint.folder, local_files_only=True
        )
    return model.eval()


def _fill_buffers(model: nn.Module) -> None:
    """Make the buffers that no checkpoint holds (rotary frequencies, position ids) real."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                module.register_buffer(name, buffer, persistent=False)


def _rows(output: Any) -> torch.Tensor:
    """Visual tokens [rows, W] of a module that returns them, or a record that holds them."""
    tokens: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return tokens.flatten(0, -2)


def _per_call(features: list[torch.Tensor], calls: int) -> tuple[NDArray[np.float32], ...]:
    if not features:
        return ()
    stacked = torch.cat(features)
    return tuple(part.float().flatten(0, -2).numpy() for part in stacked.chunk(calls))


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Cut behind the first end token."""
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens
