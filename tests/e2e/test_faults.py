"""A fault in a written graph fails the compile, and the report names its site."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgevlm.cache import StageCache
from edgevlm.compile import Job, file_entries
from edgevlm.errors import EvidenceError
from edgevlm.evidence.gather import graph_evidence, model_evidence
from edgevlm.progress import Silent
from edgevlm.recipe import load_recipe
from tests.e2e.faults import shift_rotation, swap_weight, widen_epsilon

Plant = Callable[[Path], None]

FAULTS: dict[str, tuple[str, str, Plant]] = {
    "a vision weight": (
        "vision",
        "vision.layers.1.attention.out",
        lambda path: swap_weight(
            path, "vision.layers.1.attention.out", "vision.layers.0.attention.out"
        ),
    ),
    "a projector weight": (
        "vision",
        "projector.down",
        lambda path: swap_weight(path, "projector.down", "projector.up"),
    ),
    "a decoder weight": (
        "step",
        "decoder.layers.0.mlp.gate",
        lambda path: swap_weight(path, "decoder.layers.0.mlp.gate", "decoder.layers.0.mlp.up"),
    ),
    "an epsilon": (
        "step",
        "decoder.layers.1.norm2",
        lambda path: widen_epsilon(path, "decoder.layers.1.norm2"),
    ),
    "a rotary offset": (
        "step",
        "decoder.layers.1.attention.core",
        lambda path: shift_rotation(path, "decoder.layers.1.attention.core"),
    ),
}


@pytest.mark.parametrize("target", ["ort", "static"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_report_names_the_site(
    bundle: Path, workshop: Path, cache: StageCache, tmp_path: Path, target: str, fault: str
) -> None:
    role, site, plant = FAULTS[fault]
    staged = tmp_path / "bundle"
    shutil.copytree(bundle, staged)
    files = sorted(staged.glob(f"{target}.{role}*.onnx"))
    assert files
    for path in files:
        plant(path)
    _reseal(staged)

    job = Job(load_recipe(workshop / "recipe.yaml"), cache, Silent())
    subject, climb = job.subject(), job.climb()
    below = model_evidence(subject, climb)
    variant = next(variant for variant in job.plan.variants if variant.target == target)
    with pytest.raises(EvidenceError) as failed:
        graph_evidence(subject, climb, below, variant, staged, f"{target} with {fault}")
    assert failed.value.site == site
    assert failed.value.rung == target
    assert str(failed.value).startswith(f"{target} is not ours: ")
    assert f"the first diverging site is {site!r}" in str(failed.value)
    assert failed.value.exit_code == 4


def _reseal(folder: Path) -> None:
    """Give the altered files the hashes they have now, so that only evidence can tell."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.unlink()
    manifest["files"] = {
        name: {"size": entry.size, "sha256": entry.sha256}
        for name, entry in file_entries(folder).items()
    }
    path.write_text(json.dumps(manifest))
