"""Progress of long work: stages that know how much they have to do, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Whoever shows progress: the command line, a log, nobody."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Open a stage of `total` units; the block calls what it is given with units done."""
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Open a stage that nobody sees."""
        yield lambda units: None
