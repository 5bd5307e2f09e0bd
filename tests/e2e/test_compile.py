"""From a checkpoint to a bundle that answers as the Hugging Face model does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgevlm.cache import StageCache
from edgevlm.compile import compile_recipe
from edgevlm.errors import EvidenceError
from edgevlm.evaluate import evaluate
from edgevlm.progress import Silent
from edgevlm.recipe import load_recipe
from edgevlm.samples import draw_samples
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.session import Session
from tests.e2e.checkpoint import write_recipe

VARIANTS = ("ort", "static")


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_those_of_the_hugging_face_model(
    bundle: Path, workshop: Path, cache: StageCache, variant: str
) -> None:
    samples = draw_samples(None, split="evaluation", count=27, seed=3)
    report = evaluate(
        Bundle.open(bundle, variant),
        samples,
        progress=Silent(),
        referee=workshop / "tiny",
        cache=cache,
        max_new_tokens=12,
    )
    assert report.token_agreement == 1.0
    assert report.reference == report.accuracy


def test_the_ladder_is_written_down(bundle: Path) -> None:
    evidence = json.loads((bundle / "manifest.json").read_text())["provenance"]["evidence"]
    parents = {rung["name"]: rung["parent"] for rung in evidence["rungs"]}
    assert parents == {
        "hf": None,
        "ours": "hf",
        "ort": "ours",
        "ort/runtime": "ort",
        "static": "ours",
        "static/runtime": "static",
    }
    for rung in evidence["rungs"][1:]:
        assert all(gate["passed"] for gate in rung["gates"])
        assert rung["tokens"]["flips"] == 0
    for rung in evidence["rungs"]:
        if rung["kind"] in ("model", "graph"):
            # Float32 in another order of additions; the gate for graphs is ten times wider.
            assert rung["decoder"]["relative_error"] < 1e-4
            assert rung["vision"]["relative_error"] < 1e-4


def test_both_variants_share_their_weights(bundle: Path) -> None:
    variants = Bundle.open(bundle).manifest.variants
    files = {
        name for variant in variants.values() for graph in variant.graphs for name in graph.weights
    }
    assert files == {"weights.bin", "embedding.npy"}
    size = sum((bundle / name).stat().st_size for name in files)
    parameters = (bundle.parent / "tiny" / "model.safetensors").stat().st_size
    # Every tensor once for seven graphs, each at a page boundary; the tied head is the embedding.
    assert size < 1.5 * parameters


def test_a_second_compile_reuses_every_stage(
    bundle: Path, workshop: Path, cache: StageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr("edgevlm.compile.load", refuse)
    again = compile_recipe(load_recipe(workshop / "recipe.yaml"), workshop / "again", cache=cache)
    assert {p.name for p in again.iterdir()} == {p.name for p in bundle.iterdir()}
    for path in bundle.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_stage_altered_in_the_cache_is_measured_anew(
    bundle: Path, workshop: Path, cache: StageCache, tmp_path: Path
) -> None:
    copy = StageCache(root=tmp_path / "cache")
    shutil.copytree(cache.root, copy.root)
    for weights in copy.root.glob("graphs/*/weights.bin"):
        weights.write_bytes(bytes(weights.stat().st_size))
    out = tmp_path / "bundle"
    with pytest.raises(EvidenceError) as error:
        compile_recipe(load_recipe(workshop / "recipe.yaml"), out, cache=copy)
    assert error.value.rung == "ort"
    assert not out.exists()


def test_a_killed_compile_leaves_nothing_and_the_next_one_resumes(
    workshop: Path, cache: StageCache
) -> None:
    out = workshop / "killed"
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import edgevlm.compile as c\n"
        "from edgevlm.recipe import load_recipe\n"
        "def kill(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)\n"
        "c.graph_evidence = kill\n"
        "c.compile_recipe(load_recipe(sys.argv[1]), Path(sys.argv[2]),"
        " cache=c.StageCache(root=Path(sys.argv[3])))\n"
    )
    arguments = [workshop / "recipe.yaml", out, cache.root]
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=False)
    assert done.returncode == -9
    assert not out.exists()
    compile_recipe(load_recipe(workshop / "recipe.yaml"), out, cache=cache)
    assert Session(Bundle.open(out)).bundle.manifest.name == "recipe"


def test_one_target_alone(workshop: Path, cache: StageCache, tmp_path: Path) -> None:
    (tmp_path / "tiny").symlink_to(workshop / "tiny", target_is_directory=True)
    recipe = write_recipe(
        tmp_path,
        "targets: [ort]",
        "context: {capacity: 512}",
        "evidence: {samples: 2, max_new_tokens: 4}",
    )
    out = compile_recipe(load_recipe(recipe), tmp_path / "bundle", cache=cache)
    manifest = Bundle.open(out).manifest
    assert list(manifest.variants) == ["ort"]
    assert manifest.provenance["changes"] == []


def test_a_picture_changes_the_answer(bundle: Path) -> None:
    session = Session(Bundle.open(bundle))
    random = np.random.default_rng(0)
    answers = {
        session.generate(
            "What is this?",
            [random.integers(0, 255, (96, 96, 3), np.uint8)],
            max_new_tokens=12,
            temperature=0.0,
        ).tokens
        for _ in range(4)
    }
    assert len(answers) > 1
