"""Renders the reference model's card from its figures, so that no number is typed twice.

The folder holds `figures.json`, written by `python -m edgevlm.scenes.evaluate`, and
`training.json`: the commands, hours, seeds and pictures of each stage.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from edgevlm.scenes.words import GRADED_TASKS

FIGURES_FILE = "figures.json"
TRAINING_FILE = "training.json"
CARD_FILE = "README.md"

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# scenes-vlm

A vision-language model of {parameters_m:.1f} million parameters that answers questions about drawn
scenes. It is small enough to quantize, prune, compile and evaluate in minutes on a laptop, and real
enough that doing so badly shows. It knows nothing but these scenes: use it to test a deployment,
not to look at the world.

## Figures

{num_samples:,} questions of the `{split}` split (seed {seed}), one in ten about two pictures, one
in three after earlier turns; greedy decoding in float32 through stock transformers. The control
answers the same questions about uniform grey pictures: what it scores is guessing.

{table}

A box counts as found from an overlap (intersection over union) of 0.5. A description scores the F1
of the facts it states. Intervals are Wilson's, for descriptions normal. The figures are in
[{figures_file}]({figures_file}); this page is rendered from them with
`python -m edgevlm.scenes.card`.

```sh
python -m edgevlm.scenes.evaluate recipes/models/scenes-vlm --limit {num_samples} --blank
```

## Architecture

`LlavaForConditionalGeneration`. Vision: CLIP, 96 x 96 pixels in 8 x 8 patches, 144 visual tokens,
6 layers of width 192 with 6 heads, class token dropped. Projector: two linear layers with GELU.
Decoder: Llama, 10 layers of width 192, 6 query and 2 key-value heads of 32, MLP 512, RoPE, tied
embeddings, 2,048 positions. Vocabulary: {vocabulary} byte-level BPE tokens, of which the last 16
are unused. Every colour, shape, size, place and number up to 31 is one token, every character of a
sign too.

## Training

From random weights, on drawn pictures only; no picture of the evaluation or calibration split
was used. `python -m edgevlm.scenes.train --help` says what the stages do.

{training}

```sh
{commands}
```

## Licence

Apache-2.0. The weights and the generator that made their data are part of edgevlm.
"""


def main(arguments: list[str] | None = None) -> None:
    """Write the card of a model folder."""
    parser = argparse.ArgumentParser(prog="python -m edgevlm.scenes.card", description=__doc__)
    parser.add_argument("model", type=Path, help="model folder")
    folder = parser.parse_args(arguments).model
    (folder / CARD_FILE).write_text(render_card(folder), encoding="utf-8")


def render_card(folder: Path) -> str:
    """The card of a model folder."""
    figures = json.loads((folder / FIGURES_FILE).read_text(encoding="utf-8"))
    training = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
    stages = [
        f"* {stage['stage']}: {stage['hours']:.2f} hours on {stage['machine']}, "
        f"{stage['pictures']:,} pictures, seed {stage['seed']}"
        for stage in training["stages"]
    ]
    return _CARD.format(
        parameters_m=training["parameters"] / 1e6,
        vocabulary=training["vocabulary"],
        num_samples=figures["num_samples"],
        split=figures["split"],
        seed=figures["seed"],
        table=render_table(figures["scores"], figures["blank"]),
        figures_file=FIGURES_FILE,
        training="\n".join(stages),
        commands="\n".join(training["commands"]),
    )


def render_table(scores: dict[str, Any], blank: dict[str, Any] | None) -> str:
    """Scores by task as a Markdown table, in percent, the graded tasks last."""
    lines = [
        "| task | score, % | 95 % interval | grey picture, % | questions |",
        "|---|---:|---:|---:|---:|",
    ]
    for task, entry in scores["tasks"].items():
        guess = _percent(None if blank is None else blank["tasks"][task]["accuracy"])
        interval = f"{100 * entry['low']:.1f} to {100 * entry['high']:.1f}"
        lines.append(
            f"| {task} | {100 * entry['accuracy']:.1f} | {interval} | {guess} | {entry['n']} |"
        )
    guess = _percent(None if blank is None else blank["mean_accuracy"])
    mean = _percent(scores["mean_accuracy"])
    without = " and ".join(GRADED_TASKS)
    lines.append(f"| **mean without {without}** | **{mean}** | | {guess} | |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


if __name__ == "__main__":
    main()
