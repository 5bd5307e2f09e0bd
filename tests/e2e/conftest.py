"""One small model, compiled once for all end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.cache import StageCache
from edgevlm.compile import compile_recipe
from edgevlm.recipe import load_recipe
from tests.e2e.checkpoint import save_tiny_checkpoint, write_recipe

RECIPE = (
    "context: {capacity: 512}",
    "passes:",
    "  - fold_norms: {}",
    "evidence: {samples: 9, max_new_tokens: 12}",
)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `tiny`, `recipe.yaml`, and the stage cache `cache`."""
    folder = tmp_path_factory.mktemp("workshop")
    save_tiny_checkpoint(folder / "tiny")
    write_recipe(folder, *RECIPE)
    return folder


@pytest.fixture(scope="session")
def cache(workshop: Path) -> StageCache:
    """The stage cache of all end-to-end tests."""
    return StageCache(root=workshop / "cache")


@pytest.fixture(scope="session")
def bundle(workshop: Path, cache: StageCache) -> Path:
    """The tiny checkpoint, compiled for both targets."""
    return compile_recipe(load_recipe(workshop / "recipe.yaml"), workshop / "bundle", cache=cache)
