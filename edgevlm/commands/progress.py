"""Progress as people see it: bars with the time left on a terminal, lines in a log elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

from edgevlm.progress import Advance, Progress, Silent

__all__ = ["Bars", "Lines", "shown_progress", "silence_libraries"]

SECONDS_BETWEEN_LINES = 10.0


def shown_progress(*, quiet: bool) -> Progress:
    """What this run shows: nothing when quiet, bars on a terminal, else lines on stderr."""
    if quiet:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines(sys.stderr)


def silence_libraries() -> None:
    """Turn off the progress bars of transformers, which would run through ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


class Bars:
    """One bar per stage on the terminal, on stderr."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Open a stage of `total` units."""
        return self._bar(name, total)

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(name, total=total)
            yield lambda units: bars.advance(task, units)


class Lines:
    """A line when a stage begins and ends, and every ten seconds between."""

    def __init__(self, out: TextIO, interval_s: float = SECONDS_BETWEEN_LINES) -> None:
        """Write to `out`."""
        self._out, self._interval_s = out, interval_s

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Open a stage of `total` units."""
        begun = shown = time.monotonic()
        done = 0

        def advance(units: int) -> None:
            nonlocal done, shown
            done += units
            now = time.monotonic()
            if done and now - shown >= self._interval_s:
                shown = now
                left_s = (now - begun) / done * max(total - done, 0)
                self._write(f"{name}: {done} of {total}, about {left_s:.0f} s left")

        self._write(f"{name}: {total} to do")
        yield advance
        self._write(f"{name}: done in {time.monotonic() - begun:.1f} s")

    def _write(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()
