"""Other families than the reference model's, from drawn weights to a bundle within its gates."""

from __future__ import annotations

import json
import shutil
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


def test_tiles_pixel_shuffle_and_a_norm_behind_the_last_layer(
    root: Path, tmp_path: Path, cache: StageCache
) -> None:
    """SmolVLM as published, but for its sizes: a picture becomes tiles and itself."""
    model = tmp_path / "model"
    shutil.copytree(root / "recipes" / "models" / "smolvlm-500m-shape", model)
    edit(
        model / "config.json",
        text_config={"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        vision_config={"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
        | {"num_attention_heads": 3, "image_size": 128},
    )
    edit(
        model / "preprocessor_config.json",
        max_image_size={"longest_edge": 128},
        size={"longest_edge": 256},
    )
    edit(model / "processor_config.json", image_seq_len=4)
    (tmp_path / "recipe.yaml").write_text(
        "model: model\n"
        "device: host-cpu\n"
        "context: {capacity: 256}\n"
        "evidence: {samples: 2, max_new_tokens: 6}\n"
    )
    out = compile_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "bundle", cache=cache)
    evidence = Bundle.open(out).manifest.provenance["evidence"]
    assert [rung["name"] for rung in evidence["rungs"]][-2:] == ["static", "static/runtime"]
    for rung in evidence["rungs"]:
        assert all(gate["passed"] for gate in rung["gates"])


def edit(path: Path, **changes: object) -> None:
    """Change values of a JSON file, those of an object one by one."""
    document = json.loads(path.read_text())
    for name, value in changes.items():
        document[name] = {**document[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(document))
