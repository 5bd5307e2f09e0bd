"""`python -m edgevlm.schemas`: write the schemas that follow from the code anew.

Those of recipes, of device files and of `devices --json` do; the others, beside this file, are
contracts written by hand, which the outputs are held against.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm import device, recipe
from edgevlm.resources import data_folder, schema_file


def main() -> None:
    """Write all three."""
    write(data_folder("recipes") / "recipe.schema.json", recipe.json_schema())
    write(data_folder("devices") / "device.schema.json", device.json_schema())
    write(schema_file("devices"), device.json_schema_of_all())


def write(path: Path, schema: Mapping[str, Any]) -> None:
    """Write one schema."""
    path.write_text(json.dumps(schema, indent=2) + "\n")


if __name__ == "__main__":
    main()
