"""Errors a user can cause and mend: one clause says what is wrong, one hint says the remedy.

EdgeVlmError          exit code 1
|-- BundleError       5  missing, altered, unsafe, or of a format version that is not read
|-- EngineError       3  a graph cannot be loaded or run on this machine
|-- InputError        2  an image or a prompt does not fit the bundle (also a ValueError)
`-- ResourceError     6  memory, disk, or a lock that somebody else holds
"""

from __future__ import annotations

from typing import ClassVar


class EdgeVlmError(Exception):
    """What is wrong, with the value in it, and in `hint` what to do about it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Hold one lower-case clause, and the remedy as an imperative."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """The clause, then the hint on its own line."""
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class BundleError(EdgeVlmError):
    """The bundle is missing, altered, unsafe, or of another format version."""

    exit_code = 5


class EngineError(EdgeVlmError):
    """A graph cannot be loaded or run on this machine."""

    exit_code = 3


class InputError(EdgeVlmError, ValueError):
    """An image or a prompt does not fit the bundle."""

    exit_code = 2


class ResourceError(EdgeVlmError):
    """Memory, disk space, or a lock held by somebody else."""

    exit_code = 6
