"""Evaluates a checkpoint on scenes, beside a control that sees uniform grey pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from edgevlm.commands.progress import shown_progress
from edgevlm.progress import Progress
from edgevlm.scenes.card import render_table
from edgevlm.scenes.sample import Sample, scenes_samples
from edgevlm.scenes.score import Scores, score, scores_json, summarize

_GREY = (96, 96, 96)
_MAX_NEW_TOKENS = 72

Answer = Callable[[Sequence[Sample]], list[str]]


def main(arguments: list[str] | None = None) -> None:
    """Evaluate, print a table and, where asked, write the figures as JSON."""
    options = _parser().parse_args(arguments)
    samples = scenes_samples(options.split, options.limit, options.seed)
    progress = shown_progress(quiet=False)
    answer = load_answerer(options.model, batch=options.batch, progress=progress)
    seen = evaluate(answer, samples)
    blank = evaluate(answer, [blanked(sample) for sample in samples]) if options.blank else None
    figures: dict[str, Any] = {
        "split": options.split,
        "seed": options.seed,
        "num_samples": len(samples),
        "scores": scores_json(seen),
        "blank": None if blank is None else scores_json(blank),
    }
    print(render_table(figures["scores"], figures["blank"]))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def evaluate(answer: Answer, samples: Sequence[Sample]) -> Scores:
    """Score the answers to samples."""
    predictions = answer(samples)
    return summarize(
        (sample.task, score(sample.task, prediction, sample))
        for sample, prediction in zip(samples, predictions, strict=True)
    )


def blanked(sample: Sample) -> Sample:
    """The same conversation over uniform grey pictures: what guessing is worth."""
    return replace(
        sample, images=tuple(Image.new("RGB", image.size, _GREY) for image in sample.images)
    )


def load_answerer(folder: Path, *, batch: int, progress: Progress) -> Answer:
    """Greedy answers of a checkpoint through stock transformers, in batches of like prompts."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    host = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The precision of every comparison in this project, and fast on any processor.
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.to(host).eval()

    def answer(samples: Sequence[Sample]) -> list[str]:
        answers = [""] * len(samples)
        order = _alike(samples)
        with progress.stage("questions", len(samples)) as advance:
            for first in range(0, len(order), batch):
                chosen = order[first : first + batch]
                texts = [
                    processor.apply_chat_template(
                        list(samples[index].messages), tokenize=False, add_generation_prompt=True
                    )
                    for index in chosen
                ]
                images = [list(samples[index].images) for index in chosen]
                inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
                inputs = inputs.to(host, dtype=model.dtype)
                with torch.inference_mode():
                    out = model.generate(**inputs, do_sample=False, max_new_tokens=_MAX_NEW_TOKENS)
                new = out[:, inputs["input_ids"].shape[1] :]
                decoded = processor.batch_decode(new, skip_special_tokens=True)
                for index, text in zip(chosen, decoded, strict=True):
                    answers[index] = text
                advance(len(chosen))
        return answers

    return answer


def _alike(samples: Sequence[Sample]) -> list[int]:
    """Numbers of the samples, like prompts together: by pictures, descriptions apart, by turns."""

    def shape(index: int) -> tuple[int, bool, int]:
        sample = samples[index]
        return len(sample.images), sample.task == "describe", len(sample.messages)

    return sorted(range(len(samples)), key=shape)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m edgevlm.scenes.evaluate", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--limit", type=int, default=2000, help="questions (default 2000)")
    parser.add_argument("--split", default="evaluation", help="evaluation or calibration")
    parser.add_argument("--seed", type=int, default=0, help="which samples (default 0)")
    parser.add_argument("--batch", type=int, default=32, help="prompts at once (default 32)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--blank", action="store_true", help="evaluate the control beside it")
    return parser


if __name__ == "__main__":
    main()
