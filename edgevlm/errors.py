"""Errors of the compiler, on top of the runtime's tree (`edgevlm_runtime.errors`).

EdgeVlmError
|-- RecipeError   2  a recipe, a device file or a folder of samples; carries path, line, column
|-- ModelError    2  a checkpoint that cannot be read, or that says something no family knows
|-- PassError     2  a pass that does not apply, or matched nothing; carries name and site
|-- DeviceError   3  an op, a dtype or a size that the device lacks
`-- EvidenceError 4  a gate failed; carries the rung and the first diverging site
"""

from __future__ import annotations

from pathlib import Path

from edgevlm_runtime.errors import EdgeVlmError


class RecipeError(EdgeVlmError):
    """A file the user wrote is wrong at a place: `path:line:column: message`."""

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        path: Path | str | None = None,
        line: int | None = None,
        column: int | None = None,
    ) -> None:
        """Prefix the clause with the place, as far as it is known."""
        place = ":".join(str(part) for part in (path, line, column) if part is not None)
        super().__init__(f"{place}: {message}" if place else message, hint=hint)
        self.path, self.line, self.column = path, line, column


class ModelError(EdgeVlmError):
    """A checkpoint that cannot be read, or that says something no family knows."""

    exit_code = 2


class PassError(EdgeVlmError):
    """A pass that does not apply to this model, or matched nothing."""

    exit_code = 2

    def __init__(
        self, message: str, *, name: str, site: str | None = None, hint: str | None = None
    ) -> None:
        """Prefix the clause with the pass, and the site where there is one."""
        place = name if site is None else f"{name} at {site}"
        super().__init__(f"{place}: {message}", hint=hint)
        self.name, self.site = name, site


class DeviceError(EdgeVlmError):
    """The device cannot do what the recipe asks."""

    exit_code = 3


class EvidenceError(EdgeVlmError):
    """A compiled graph is not the model it was made from."""

    exit_code = 4

    def __init__(
        self, message: str, *, rung: str, site: str | None = None, hint: str | None = None
    ) -> None:
        """Say which rung failed and, where bisection found it, the first diverging site."""
        super().__init__(message, hint=hint)
        self.rung, self.site = rung, site
