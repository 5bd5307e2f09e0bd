"""`make demo`: compile the reference model, show it a picture, let it answer and describe.

    python -m edgevlm.demo [FOLDER]

The picture is of the evaluation split: training never drew it.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from edgevlm.cli import run as run_command_line
from edgevlm.commands.bundle import show_evidence
from edgevlm.commands.output import console
from edgevlm.commands.run import RunOptions, stream_to, timings_line
from edgevlm.resources import data_folder
from edgevlm.scenes import SPLITS, draw_scene, make_scene
from edgevlm.scenes.ask import ask
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.session import Session

SCENE = 2
TASKS = ("count", "colour", "read")
COLUMNS = 56
DEFAULTS = RunOptions(
    max_new_tokens=None, temperature=None, top_k=None, top_p=None, stop=(), seed=None
)


def main() -> int:
    """Run the demo and return the exit code."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build")
    out, bundle_path = console(), folder / "quickstart"
    recipe = data_folder("recipes") / "quickstart.yaml"
    out.print(f"edgevlm compile {recipe.name} --out {bundle_path}", style="bold")
    code = run_command_line(["compile", str(recipe), "--out", str(bundle_path)])
    if code:
        return code

    scene = make_scene(SPLITS["evaluation"].start + SCENE)
    picture = draw_scene(scene)
    path = folder / "demo" / "picture.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    out.print()
    out.print(f"the picture: {path}", style="bold")
    if out.is_terminal:
        out.print(in_blocks(picture, COLUMNS))

    bundle = Bundle.open(bundle_path)
    session = Session(bundle)
    rng = random.Random(SCENE)
    for task in TASKS:
        question = ask(scene, task, rng)
        if question is not None:
            answer = session.generate(question.text, [path]).text
            show_answer(out, question.text, answer, question.answer)
    describe = ask(scene, "describe", rng)
    assert describe is not None, "every scene can be described"
    out.print()
    out.print(describe.text, style="bold")
    completion = stream_to(sys.stdout, session, describe.text, [path], DEFAULTS)
    out.print(timings_line(completion), style="dim")

    out.print()
    show_evidence(bundle.manifest.provenance, out)
    out.print()
    out.print(f"the bundle: {bundle_path}", style="bold")
    out.print(f"ask it yourself: edgevlm run {bundle_path} 'Describe the picture.' -i {path}")
    return 0


def show_answer(out: Console, question: str, answer: str, truth: str) -> None:
    """Print a question, the model's answer, and what is true where that is something else."""
    out.print()
    out.print(question, style="bold")
    out.print(answer if answer == truth else f"{answer}  (it is {truth})")


def in_blocks(picture: Image.Image, columns: int) -> Text:
    """A picture as text: each character is two pixels, one above the other."""
    rows = round(columns * picture.height / picture.width / 2) * 2
    small = picture.convert("RGB").resize((columns, rows), Image.Resampling.LANCZOS)
    text = Text()
    for y in range(0, rows, 2):
        for x in range(columns):
            upper, lower = (_hex(small.getpixel((x, y + below))) for below in (0, 1))
            text.append("\N{UPPER HALF BLOCK}", style=f"{upper} on {lower}")
        text.append("\n")
    return text


def _hex(pixel: object) -> str:
    assert isinstance(pixel, tuple)
    return "#{:02x}{:02x}{:02x}".format(*pixel)


if __name__ == "__main__":
    sys.exit(main())
