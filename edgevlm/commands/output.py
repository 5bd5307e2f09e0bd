"""What commands write: one JSON document on stdout, or text; progress and logs on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "console",
    "counted",
    "marked",
    "mebibytes",
    "plain",
    "print_json",
    "shape",
    "table",
]

STYLES = {
    "degraded": "yellow",
    "untested": "yellow",
    "missing": "yellow",
    "refused": "red",
    "no": "red",
}


def console() -> Console:
    """The terminal that results are written to; a pipe gets lines of 120 characters.

    Text is printed as it is: names in a bundle or a recipe are not markup.
    """
    width = None if sys.stdout.isatty() else 120
    return Console(highlight=False, emoji=False, markup=False, width=width)


def print_json(document: Mapping[str, Any]) -> None:
    """Write one JSON document to stdout; what JSON cannot say (NaN) is an error."""
    sys.stdout.write(json.dumps(plain(document), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def table(title: str | None, *columns: str) -> Table:
    """A table without borders; its first column is never cut."""
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for number, column in enumerate(columns):
        made.add_column(column, no_wrap=number == 0, header_style="dim")
    return made


def marked(word: str) -> Text:
    """A word, coloured where it is one to look at."""
    return Text(word, style=STYLES.get(word, ""))


def shape(sizes: tuple[int | str, ...]) -> str:
    """A shape as text, dynamic dimensions by name."""
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def mebibytes(count: float) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:,.1f} MiB"


def counted(count: int) -> str:
    """A large number by thousands: 2.66 T, 191 G, 12.1 M, 640."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # Three digits: what rounds up to a thousand has the next letter.
        if count >= 0.9995 * size:
            value = count / size
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:,.{digits}f} {letter}"
    return str(count)
