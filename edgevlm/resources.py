"""Where the data files are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent
_ROOTS = (_PACKAGE / "_data", _PACKAGE.parent)  # installed wheel, then git checkout

CONSTRAINTS_NAME = "constraints.txt"


def data_folder(name: str) -> Path:
    """The folder `recipes` or `devices`."""
    for root in _ROOTS:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"no folder {name!r} in {' or '.join(str(root) for root in _ROOTS)}")


def device_files() -> dict[str, Path]:
    """Device files by the name of the device."""
    return {path.stem: path for path in sorted(data_folder("devices").glob("*.yaml"))}


def recipe_files() -> dict[str, Path]:
    """Recipes by name."""
    return {path.stem: path for path in sorted(data_folder("recipes").glob("*.yaml"))}


def constraints_file() -> Path:
    """The versions that were tested together."""
    for root in _ROOTS:
        if (root / CONSTRAINTS_NAME).is_file():
            return root / CONSTRAINTS_NAME
    raise FileNotFoundError(f"no {CONSTRAINTS_NAME}")


def schema_file(name: str) -> Path:
    """The JSON Schema of one JSON output of the command line."""
    return _PACKAGE / "schemas" / f"{name}.schema.json"
