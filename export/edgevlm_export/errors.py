"""The error of the export side."""

from __future__ import annotations

from edgevlm_runtime.errors import EdgeVlmError


class ExportError(EdgeVlmError):
    """A graph holds something its target cannot take; carries the graph's role and the op."""

    exit_code = 3

    def __init__(
        self, message: str, *, role: str, op: str | None = None, hint: str | None = None
    ) -> None:
        """Prefix the clause with the graph's role."""
        super().__init__(f"{role}: {message}", hint=hint)
        self.role, self.op = role, op
