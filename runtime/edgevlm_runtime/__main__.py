"""`edgevlm-run`: look into a bundle, or ask it something, without the compiler."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from edgevlm_runtime._version import __version__
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.completion import Completion
from edgevlm_runtime.errors import EdgeVlmError
from edgevlm_runtime.session import Session
from edgevlm_runtime.structure import to_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
        return code
    except EdgeVlmError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgevlm-run", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True)
    inspect = commands.add_parser("inspect", help="check every file, and say what is inside")
    inspect.set_defaults(command=_inspect)
    run = commands.add_parser("run", help="ask a question, about pictures if any are given")
    run.set_defaults(command=_run)
    for command in (inspect, run):
        command.add_argument("bundle", help="the bundle's folder")
        command.add_argument("--variant", help="one of its variants, the default one if left out")
        command.add_argument("--json", action="store_true", help="one JSON document on stdout")
    run.add_argument("--prompt", required=True, help="the question")
    run.add_argument("--image", action="append", default=[], help="a picture; may be repeated")
    run.add_argument("--max-new-tokens", type=int)
    run.add_argument("--temperature", type=float)
    run.add_argument("--seed", type=int)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle, options.variant)
    bundle.check()
    manifest = bundle.manifest
    if options.json:
        sys.stdout.write(json.dumps(to_json(manifest), indent=2) + "\n")
        return 0
    size = sum(entry.size for entry in manifest.files.values())
    lines = [
        f"{manifest.name}: {manifest.model.name} ({manifest.model.family}) for {manifest.device}",
        f"{len(manifest.files)} files, {size / 2**20:.1f} MiB, all as listed",
    ]
    for name, variant in manifest.variants.items():
        mark = " (default)" if name == manifest.default_variant else ""
        lines.append(f"variant {name}{mark}, target {variant.target}")
        for graph in variant.graphs:
            served = f" [{' '.join(graph.phases)}]" if graph.phases else ""
            lines.append(f"  {graph.role:<10} {graph.name} on {graph.engine.kind}{served}")
        lines += [f"  state      {group.name}: {group.capacity} slots" for group in variant.state]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _run(options: argparse.Namespace) -> int:
    session = Session(Bundle.open(options.bundle, options.variant))
    completion: Completion | None = None
    for event in session.stream(
        options.prompt,
        options.image,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    ):
        completion = event.completion
        if not options.json:
            sys.stdout.write(event.text)
            sys.stdout.flush()
    assert completion is not None, "the last event carries the completion"
    if options.json:
        sys.stdout.write(json.dumps(to_json(completion), indent=2) + "\n")
    else:
        timings = completion.timings
        sys.stdout.write("\n")
        sys.stderr.write(
            f"{completion.finish_reason}: first token after {timings.first_token_ms:.0f} ms, "
            f"then {timings.tokens_per_second:.1f} tokens a second\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
