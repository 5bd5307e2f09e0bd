"""`python -m edgevlm.schemas`: write the schemas of recipes and devices anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm import device, recipe
from edgevlm.resources import data_folder


def main() -> None:
    """Write both files."""
    write(data_folder("recipes") / "recipe.schema.json", recipe.json_schema())
    write(data_folder("devices") / "device.schema.json", device.json_schema())


def write(path: Path, schema: Mapping[str, Any]) -> None:
    """Write one schema."""
    path.write_text(json.dumps(schema, indent=2) + "\n")


if __name__ == "__main__":
    main()
