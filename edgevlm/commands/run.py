"""`edgevlm run`: a bundle answers a prompt, streaming, with the runtime alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgevlm.commands.output import print_json
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.completion import Completion
from edgevlm_runtime.session import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How to generate; what is None is taken from the bundle."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    stop: tuple[str, ...]
    seed: int | None


def run_command(
    path: Path,
    prompt: str,
    images: Sequence[Path],
    variant: str | None,
    options: RunOptions,
    *,
    as_json: bool,
) -> None:
    """Answer a prompt: text as it comes, or one document at the end."""
    session = Session(Bundle.open(path, variant))
    if as_json:
        completion = session.generate(prompt, images, **asdict(options))
        print_json(completion_document(completion))
        return
    completion = stream_to(sys.stdout, session, prompt, images, options)
    sys.stderr.write(timings_line(completion) + "\n")


def stream_to(
    out: Any, session: Session, prompt: str, images: Sequence[Any], options: RunOptions
) -> Completion:
    """Write the answer as it becomes certain, and return it whole."""
    completion = None
    for event in session.stream(prompt, images, **asdict(options)):
        out.write(event.text)
        out.flush()
        completion = event.completion
    out.write("\n")
    out.flush()
    assert completion is not None, "the last event of a stream carries the completion"
    return completion


def completion_document(completion: Completion) -> dict[str, Any]:
    """A completion as JSON has it (`schemas/run.schema.json`)."""
    timings = completion.timings
    return {
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "timings": {
            "preprocess_ms": timings.preprocess_ms,
            "vision_ms": timings.vision_ms,
            "prefill_ms": timings.prefill_ms,
            "token_ms": timings.token_ms,
            "first_token_ms": timings.first_token_ms,
            "tokens_per_second": timings.tokens_per_second,
        },
    }


def timings_line(completion: Completion) -> str:
    """Where the time went, in one line."""
    timings = completion.timings
    return (
        f"{len(completion.tokens)} tokens; first after {timings.first_token_ms:.0f} ms "
        f"(preprocess {timings.preprocess_ms:.0f}, vision {timings.vision_ms:.0f}, "
        f"prefill {timings.prefill_ms:.0f}), then {timings.tokens_per_second:.0f} tokens/s"
    )
