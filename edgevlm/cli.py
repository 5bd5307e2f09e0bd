"""The command line: verbs, their options, and errors turned into exit codes.

A verb's work is in `edgevlm.commands`, imported when the verb is called, so that `--help` is quick.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from edgevlm_runtime._version import __version__
from edgevlm_runtime.errors import EdgeVlmError, ResourceError

EXIT_CODES = """Exit codes:
0 done;
1 a bug, with a traceback;
2 wrong usage, recipe, model or input;
3 not possible on this device or machine;
4 an evidence gate failed;
5 a damaged bundle;
6 memory, disk, or a lock;
130 interrupted."""
_NO_SPACE = ("no space left for", "free some space")
_NO_PERMISSION = ("no permission for", "change its permissions, or choose another place")
REFUSALS = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EROFS: _NO_PERMISSION,
}
"""What a file system refuses, and is no bug: the clause and the remedy."""

USAGE = 2
INTERRUPTED = 130

app = typer.Typer(
    name="edgevlm",
    help="Compile vision-language models for edge devices.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle (a folder).")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document, no progress.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
VariantOption = Annotated[
    str | None,
    typer.Option("--variant", metavar="NAME", help="ort, static, ...; else the bundle's default."),
]


class UsageError(EdgeVlmError):
    """The command line cannot be understood."""

    exit_code = USAGE


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line with these arguments and return the exit code."""
    show_traceback = "--traceback" in arguments
    try:
        code = int(app(args=arguments, prog_name="edgevlm", standalone_mode=False) or 0)
    except EdgeVlmError as error:
        return _report(error, error, show_traceback)
    except MemoryError as error:
        return _report(error, ResourceError("out of memory"), show_traceback)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        clause, hint = REFUSALS[error.errno]
        refused = ResourceError(f"{clause} {error.filename!r}", hint=hint)
        return _report(error, refused, show_traceback)
    except Exception as error:
        # Usage errors: typer has them from click, or from a copy of it, by version.
        if not hasattr(error, "format_message"):
            raise
        return _report_usage(error)
    if code == INTERRUPTED:
        typer.echo("interrupted", err=True)
    return code


def _report_usage(error: Any) -> int:
    message = error.format_message().strip().rstrip(".")
    context = error.ctx
    if not message:  # no arguments at all: the help is the answer
        typer.echo(context.get_help(), err=True)
        return USAGE
    clause, _, hint = message.partition(". ")
    verb = context.command_path if context is not None else "edgevlm"
    hint = f"{hint[0].lower()}{hint[1:]}" if hint else f"see '{verb} --help'"
    return _report(error, UsageError(f"{clause[0].lower()}{clause[1:]}", hint=hint), False)


def _report(raised: BaseException, error: EdgeVlmError, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exception(raised)
    typer.echo(f"error: {error}", err=True)
    return error.exit_code


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def edgevlm(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False,
    _: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
    __: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Compile vision-language models for edge devices."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(name)s: %(message)s",
    )


@app.command()
def compile(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Else build/NAME of the recipe."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compile a recipe to a bundle, measured against the model it was made from."""
    from edgevlm.commands.compile import compile_command

    compile_command(recipe, out, as_json=json, quiet=quiet)


@app.command()
def plan(
    recipe: RecipeArgument,
    text_rows: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            max=1_000_000,
            help="Rows of text of the prompt whose cost is shown; else as the recipe says, or 64.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what compiling a recipe would make, from the configuration alone."""
    from edgevlm.commands.plan import plan_command

    plan_command(recipe, text_rows=text_rows, as_json=json)


@app.command("run")
def run_bundle(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="A question or an instruction.")],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", metavar="FILE", help="A picture; may be repeated."),
    ] = None,
    variant: VariantOption = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before it; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    json: JsonOption = False,
) -> None:
    """Answer a prompt about pictures, streaming."""
    from edgevlm.commands.run import RunOptions, run_command

    options = RunOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=tuple(stop or ()),
        seed=seed,
    )
    run_command(bundle, prompt, tuple(image or ()), variant, options, as_json=json)


@app.command("eval")
def evaluate(
    bundle: BundleArgument,
    limit: Annotated[int, typer.Option(min=1, help="Questions, equally many of each task.")] = 500,
    variant: VariantOption = None,
    against: Annotated[
        str | None, typer.Option(metavar="hf", help="Also ask the Hugging Face model.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where that model is, if not where it was."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Your own samples.jsonl; else the picture world."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of questions.")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure the accuracy of a bundle."""
    from edgevlm.commands.evaluate import EvalOptions, eval_command

    options = EvalOptions(
        limit=limit,
        variant=variant,
        against=against,
        checkpoint=checkpoint,
        data=data,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    eval_command(bundle, options, as_json=json, quiet=quiet)


@app.command()
def inspect(
    bundle: BundleArgument,
    audit: Annotated[
        bool, typer.Option("--audit", help="Show what ran of each graph, against what was asked.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show what a bundle holds, and the evidence for it."""
    from edgevlm.commands.inspect import inspect_command

    inspect_command(bundle, audit=audit, as_json=json)


@app.command()
def devices(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show all facts of one.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the devices, or the facts of one with their sources."""
    from edgevlm.commands.devices import devices_command

    devices_command(name, as_json=json)


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Say what is installed, what works here, and what to install for the rest."""
    from edgevlm.commands.doctor import doctor_command

    doctor_command(as_json=json)
