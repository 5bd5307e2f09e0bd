"""Other families than the reference model's, from drawn weights to a bundle within its gates."""

from __future__ import annotations

from pathlib import Path

from edgevlm.cache import StageCache
from edgevlm.compile import compile_recipe
from edgevlm.recipe import load_recipe
from edgevlm_runtime.bundle import Bundle


def test_native_resolution_with_windows_and_mrope(
    root: Path, tmp_path: Path, cache: StageCache
) -> None:
    (tmp_path / "model").symlink_to(root / "recipes" / "models" / "qwen2_5-vl-tiny")
    (tmp_path / "recipe.yaml").write_text(
        "model: model\n"
        "device: host-cpu\n"
        "image: {grids: [[16, 16], [12, 20]]}\n"
        "context: {capacity: 256}\n"
        "evidence: {samples: 3, max_new_tokens: 6}\n"
    )
    out = compile_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "bundle", cache=cache)
    manifest = Bundle.open(out).manifest
    evidence = manifest.provenance["evidence"]
    assert evidence["samples"]["weights"] == "drawn"
    # Scenes are square; one more sample is stretched to the other grid.
    pictures = evidence["samples"]["pictures"]
    assert {tuple(entry["grid"]) for entry in pictures} == {(16, 16), (12, 20)}
    assert all(entry["count"] > 0 for entry in pictures)
    assert evidence["samples"]["count"] == 4
    assert [rung["name"] for rung in evidence["rungs"]] == [
        "hf",
        "ours",
        "ort",
        "ort/runtime",
        "static",
        "static/runtime",
    ]
    for rung in evidence["rungs"]:
        assert all(gate["passed"] for gate in rung["gates"])
        # Right answers mean nothing with drawn weights, and a report never mixes the two.
        assert rung["accuracy"] == {}
    grids = {graph.grid for graph in manifest.variants["ort"].graphs if graph.role == "vision"}
    assert grids == {(16, 16), (12, 20)}
