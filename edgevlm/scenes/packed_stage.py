"""Stage 2: the whole model learns every task at once, many questions behind one picture."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch._dynamo.config
import torch._inductor.config
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from edgevlm.scenes.attention import packed_mask
from edgevlm.scenes.dense import patch_targets, picture_targets
from edgevlm.scenes.draw import draw_scene
from edgevlm.scenes.heads import DenseHeads
from edgevlm.scenes.loop import Tallies
from edgevlm.scenes.model import (
    WIDTH,
    build_model,
    build_processor,
    normalize,
    save_model,
    use_training_attention,
)
from edgevlm.scenes.pack import NO_LABEL, Vocabulary, draw_segments, num_prefix, pack
from edgevlm.scenes.precision import fast_autocast
from edgevlm.scenes.scene import Scene, check_split, make_scene
from edgevlm.scenes.tokens import ASSISTANT, END, PAD, USER, build_tokenizer, token_id
from edgevlm.scenes.words import TASKS

_PICTURES = 8
# Prefix and row together are 224 or 368 keys: whole vectors, which doubles the softmax's speed.
_WIDTH = 79
_ROWS = {1: 4, 2: 6}
# Pairs are a tenth of all questions, and the hardest: a fifth of the steps shows pictures in pairs.
_PAIR_EVERY = 5
_DENSE_WEIGHT = 0.2


class PackedStage:
    """The whole model, and the dense heads that keep the vision encoder honest."""

    def __init__(
        self,
        seed: int,
        host: torch.device,
        start: Path,
        export_to: Path | None,
        practice: Collection[str] = (),
    ) -> None:
        """Start from a stage 1 folder, or go on from a stage 2 folder or an exported checkpoint.

        A checkpoint comes without the dense heads: only the decoder can learn from it.
        """
        torch.manual_seed(seed)
        self.tokenizer = build_tokenizer()
        model = build_model(self.tokenizer)
        heads = DenseHeads(WIDTH)
        self._model, self._heads = model, heads
        whole = start / "packed.safetensors"
        self.module: nn.Module = nn.ModuleDict({"model": model, "heads": heads})
        self.has_heads = True
        if whole.exists():
            self.module.load_state_dict(load_file(whole), strict=False)
        elif (start / "config.json").exists():
            trained = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
            model.load_state_dict(trained.state_dict())
            self.has_heads = False
        else:
            load_vision(model, heads, start)
        use_training_attention(model)
        self.module.to(host)
        self._frozen = False
        self._seed = seed
        self._host = host
        self._export_to = export_to
        self._practice = practice

    def freeze_vision(self) -> None:
        """Leave the vision encoder as stage 1 made it: steps are a third faster."""
        self._model.model.vision_tower.requires_grad_(False)
        self._heads.requires_grad_(False)
        self._frozen = True

    def compile(self) -> None:
        """Fuse the layers' elementwise work; needs a C++ compiler on a CPU."""
        # The thread chooser changes the number of threads, and each has its own entry.
        torch._dynamo.config.recompile_limit = 32
        torch._inductor.config.cpp.dynamic_threads = True
        model = self._model.model
        for layer in (*model.vision_tower.encoder.layers, *model.language_model.layers):
            layer.compile(dynamic=False)

    def batches(self) -> Dataset[dict[str, torch.Tensor]]:
        """Packed sequences by step, from stage 2's own pictures."""
        return PackedPictures(self._seed, self.tokenizer, self._practice)

    def loss(self, batch: dict[str, torch.Tensor], step: int) -> tuple[torch.Tensor, Tallies]:
        """Answers weighted by task, and a little of the dense loss of stage 1."""
        with fast_autocast(self._host):
            hidden, seen, pooled = forward_packed(
                self._model, batch, user=token_id(self.tokenizer, USER)
            )
            labelled = batch["labels"] != NO_LABEL
            logits = self._model.lm_head(hidden[labelled]).float()
            dense = torch.zeros((), device=self._host)
            if not self._frozen:
                dense, _ = self._heads.loss(seen, pooled, batch["patches"], batch["picture"])
        labels, weights = batch["labels"][labelled], batch["weights"][labelled]
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        tallies = answer_tallies(logits.detach().argmax(-1) == labels, batch, labelled)
        tallies["pictures"] = (float(len(batch["pixels"])), 1.0)
        if not self._frozen:
            tallies["dense"] = (float(dense.detach()) / 100, 1.0)
        return loss + _DENSE_WEIGHT * dense, tallies

    def export(self, folder: Path) -> None:
        """Write packed.safetensors to train on from, and a checkpoint that stock code loads."""
        state = {
            name: tensor
            for name, tensor in self.module.state_dict().items()
            if not name.endswith("lm_head.weight")
        }
        save_file(state, folder / "packed.safetensors")
        if self._export_to is None:
            return
        fresh = self._export_to.with_name(self._export_to.name + ".partial")
        old = self._export_to.with_name(self._export_to.name + ".old")
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        save_model(self._model, build_processor(self.tokenizer), fresh)
        if self._export_to.exists():
            os.rename(self._export_to, old)
        os.rename(fresh, self._export_to)
        shutil.rmtree(old, ignore_errors=True)


def forward_packed(
    model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], *, user: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run packed sequences.

    Returns the decoder's normed hidden states at the rows (batch, rows, width, D), and the vision
    encoder's last layer and pooled class token for every picture.
    """
    frozen = not model.model.vision_tower.embeddings.class_embedding.requires_grad
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        seen = model.model.vision_tower(pixel_values=normalize(batch["pixels"]))
    visual = model.model.multi_modal_projector(seen.last_hidden_state[:, 1:])
    ids = batch["ids"]
    size = ids.shape[0]
    decoder = model.model.language_model
    start = decoder.embed_tokens(torch.full((size, 1), user, device=ids.device))
    visual = visual.reshape(size, -1, visual.shape[-1])
    prefix = 1 + visual.shape[1]
    rows = decoder.embed_tokens(ids).flatten(1, 2)
    hidden = torch.cat((start, visual.to(start.dtype), rows), dim=1)
    positions = torch.cat(
        (
            torch.arange(prefix, device=ids.device).expand(size, -1),
            batch["positions"].flatten(1, 2),
        ),
        dim=1,
    )
    rotary = decoder.rotary_emb(hidden, positions)
    half = torch.bfloat16 if torch.is_autocast_enabled(ids.device.type) else hidden.dtype
    rotary = tuple(part.to(half) for part in rotary)
    mask = packed_mask(batch["segments"], prefix, half)
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    hidden = decoder.norm(hidden[:, prefix:])
    return hidden.view(*ids.shape, -1), seen.last_hidden_state, seen.pooler_output


def answer_tallies(
    right: torch.Tensor, batch: dict[str, torch.Tensor], labelled: torch.Tensor
) -> Tallies:
    """Answers with every token right per task; boxes and descriptions by the token."""
    tasks = batch["tasks"][labelled]
    sequences = torch.arange(labelled.shape[0], device=labelled.device)[:, None, None]
    answers = (sequences * 1000 + batch["answers"])[labelled]
    _, inverse = answers.unique(return_inverse=True)
    wrong = torch.zeros(int(inverse.max()) + 1, device=labelled.device)
    wrong.index_add_(0, inverse, (~right).float())
    task_of = torch.zeros_like(wrong, dtype=torch.long).index_copy_(0, inverse, tasks)
    tallies: Tallies = {}
    for index, task in enumerate(TASKS):
        hits = (wrong == 0)[task_of == index]
        if task in ("box", "describe"):
            hits = right[tasks == index]
        tallies[task] = (float(hits.sum()), float(hits.numel()))
    return tallies


def load_vision(model: LlavaForConditionalGeneration, heads: DenseHeads, folder: Path) -> None:
    """Take the vision encoder and its heads from a stage 1 folder."""
    state = load_file(folder / "vision.safetensors")
    for prefix, module in (("vision.", model.model.vision_tower), ("heads.", heads)):
        module.load_state_dict(
            {
                name.removeprefix(prefix): tensor
                for name, tensor in state.items()
                if name.startswith(prefix)
            }
        )


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """What packing needs of a tokenizer; texts recur, so their ids are remembered."""
    backend = tokenizer.backend_tokenizer

    @lru_cache(maxsize=200_000)
    def encode(text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    return Vocabulary(
        encode=encode,
        user=token_id(tokenizer, USER),
        assistant=token_id(tokenizer, ASSISTANT),
        end=token_id(tokenizer, END),
        pad=token_id(tokenizer, PAD),
    )


def make_batch(
    groups: Sequence[Sequence[Scene]],
    vocabulary: Vocabulary,
    rng: random.Random,
    practice: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Pack one sequence for each group of one or two scenes."""
    num_pictures = len(groups[0])
    packed = [
        pack(
            draw_segments(scenes, rng, practice),
            vocabulary,
            first_position=num_prefix(num_pictures),
            rows=_ROWS[num_pictures],
            width=_WIDTH,
        )
        for scenes in groups
    ]
    scenes = [scene for group in groups for scene in group]
    pixels = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    batch = {
        "pixels": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        "patches": torch.from_numpy(np.stack([patch_targets(scene) for scene in scenes])),
        "picture": torch.from_numpy(np.stack([picture_targets(scene) for scene in scenes])),
    }
    for name in ("ids", "positions", "segments", "labels", "weights", "tasks", "answers"):
        batch[name] = torch.from_numpy(np.stack([getattr(one, name) for one in packed]))
    return batch


class PackedPictures(Dataset[dict[str, torch.Tensor]]):
    """Batch `step` is a pure function of the seed and the step, from stage 2's own pictures."""

    def __init__(
        self, seed: int, tokenizer: PreTrainedTokenizerFast, practice: Collection[str] = ()
    ) -> None:
        """Pictures of a training seed, asked about in the tokenizer's tokens."""
        self._first = seed * 20_000_000 + 10_000_000
        self._vocabulary = vocabulary_of(tokenizer)
        self._practice = practice

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step."""
        start = self._first + step * _PICTURES
        scenes = [
            make_scene(check_split("train", seed)) for seed in range(start, start + _PICTURES)
        ]
        rng = random.Random(f"questions {start}")
        each = 2 if step % _PAIR_EVERY == _PAIR_EVERY - 1 else 1
        groups = [scenes[first : first + each] for first in range(0, _PICTURES, each)]
        return make_batch(groups, self._vocabulary, rng, self._practice)
