"""The methods by name: recipes, and what the documentation says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.recipe import load_recipe
from edgevlm.reduce.catalogue import load_method, method_names


def test_the_documentation_lists_every_method(root: Path) -> None:
    rows = [
        line
        for line in (root / "docs" / "reduction.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    wanted = []
    for name in method_names():
        method = load_method(name)
        sites = ", ".join(f"`{site}`" for site in dict.fromkeys(x.at for x in method.stages))
        learned = " (learned)" if method.learns else ""
        wanted.append(f"| `{name}`{learned} | {sites} | {method.summary}; {method.source} |")
    assert [row for row in rows if row.count("|") == 4] == wanted


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_a_recipe(name: str, root: Path) -> None:
    recipe = load_recipe(root / "recipes" / "reduce" / f"{name}.yaml")
    (step,) = recipe.passes
    assert getattr(step, "method", None) == name
    assert recipe.targets == ("ort", "static")
