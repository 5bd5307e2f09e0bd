"""`edgevlm eval`: a bundle answers questions; its accuracy, and its agreement with the original."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from edgevlm.commands.output import console, print_json, table
from edgevlm.commands.progress import shown_progress, silence_libraries
from edgevlm.errors import ModelError
from edgevlm.resources import data_folder
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.errors import InputError

if TYPE_CHECKING:
    from edgevlm.evaluate import EvalReport

REFEREES = ("hf",)
COPIED = frozenset({"config.json", "generation_config.json", "tokenizer_config.json"})


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions:
    """What to ask, and whom besides the bundle."""

    limit: int
    variant: str | None
    against: str | None
    checkpoint: Path | None
    data: Path | None
    seed: int
    max_new_tokens: int | None


def eval_command(path: Path, options: EvalOptions, *, as_json: bool, quiet: bool) -> None:
    """Measure a bundle and show the figures."""
    if options.against not in (None, *REFEREES):
        raise InputError(f"--against {options.against!r} is not known", hint="use --against hf")
    if options.checkpoint is not None and options.against is None:
        raise InputError("--checkpoint is given without --against", hint="add --against hf")
    bundle = Bundle.open(path, options.variant)
    referee = None
    if options.against is not None:
        referee = options.checkpoint or find_checkpoint(bundle)
        check_checkpoint(bundle, referee)
        silence_libraries()

    from edgevlm.cache import StageCache, default_root
    from edgevlm.evaluate import evaluate
    from edgevlm.samples import draw_samples

    samples = draw_samples(options.data, split="evaluation", count=options.limit, seed=options.seed)
    begun = time.monotonic()
    report = evaluate(
        bundle,
        samples,
        progress=shown_progress(quiet=quiet or as_json),
        cache=StageCache(root=default_root()),
        referee=referee,
        max_new_tokens=options.max_new_tokens,
    )
    document = eval_document(bundle, options, report, time.monotonic() - begun)
    if as_json:
        print_json(document)
    else:
        show_report(document, console())


def eval_document(
    bundle: Bundle, options: EvalOptions, report: EvalReport, seconds: float
) -> dict[str, Any]:
    """The figures as JSON has them (`schemas/eval.schema.json`)."""
    return {
        "bundle": str(bundle.path),
        "variant": bundle.variant_name,
        "data": "scenes" if options.data is None else str(options.data),
        "seed": options.seed,
        "questions": len(report.answers),
        "seconds": seconds,
        "mean_accuracy": report.accuracy["mean_accuracy"],
        "tasks": report.accuracy["tasks"],
        "reference": report.reference,
        "token_agreement": report.token_agreement,
        "differing": report.differing,
    }


def show_report(document: Mapping[str, Any], out: Console) -> None:
    """Print the figures, the reference's beside them."""
    reference = document["reference"]
    figures = table(
        f"{document['questions']} questions to variant {document['variant']}",
        "task",
        "accuracy",
        "95 % interval",
        "n",
        *(() if reference is None else ("hf",)),
    )
    for name, task in document["tasks"].items():
        figures.add_row(
            name,
            f"{task['accuracy']:.1%}",
            f"{task['low']:.1%} to {task['high']:.1%}",
            str(task["n"]),
            *(() if reference is None else (f"{reference['tasks'][name]['accuracy']:.1%}",)),
        )
    out.print(figures)
    mean = document["mean_accuracy"]
    if mean is not None:
        out.print(f"mean of the exact-match tasks {mean:.2%}")
    if reference is not None:
        agreement = document["token_agreement"]
        out.print(
            f"answers token for token those of the Hugging Face model: {agreement:.2%} "
            f"({len(document['differing'])} differ)"
        )
    out.print(f"{document['seconds']:.0f} s", style="dim")


def find_checkpoint(bundle: Bundle) -> Path:
    """The folder of the checkpoint that a bundle was made from."""
    from edgevlm.checkpoint import open_checkpoint

    model = bundle.manifest.model
    if model.revision is not None:
        return open_checkpoint(model.source, model.revision).folder
    # A folder is written down as the recipe has it: relative to where the recipe was.
    for start in (data_folder("recipes"), Path.cwd(), bundle.path.parent):
        if (start / model.source / "config.json").is_file():
            return start / model.source
    raise ModelError(
        f"the checkpoint {model.source!r} of this bundle is not here",
        hint="say where it is with --checkpoint",
    )


def check_checkpoint(bundle: Bundle, folder: Path) -> None:
    """Refuse a checkpoint whose small files are not those in the bundle."""
    if not folder.is_dir():
        raise ModelError(f"there is no folder {str(folder)!r}", hint="name the checkpoint's folder")
    # The tokenizer is not among them: a bundle has it as transformers runs it.
    for name in sorted(COPIED.intersection(bundle.files)):
        path = folder / name
        if not path.is_file() or path.read_bytes() != bytes(bundle.file(name)):
            raise ModelError(
                f"{name} in {str(folder)!r} is not the one in the bundle",
                hint="name the checkpoint that the bundle was compiled from with --checkpoint",
            )
