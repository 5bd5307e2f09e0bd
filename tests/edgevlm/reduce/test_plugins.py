"""The scorer that docs/reduction.md shows, installed as a package would install it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "reduction.md").read_text()
RECIPE = """\
model: {model}
device: host-cpu
targets: [ort]
passes:
  - reduce:
      keep: 0.25
      stages:
        - {{at: projector, score: unlike, select: top}}
"""
CHECK = """
import numpy as np
import torch
from edgevlm.reduce.pieces import ScorerField
from edgevlm.reduce.piece import Scorer, known
from edgevlm.reduce.seq import VisSeq
from edgevlm.reduce.view import View

piece = known(Scorer)["unlike"]()
x = np.random.default_rng(0).standard_normal((2, 9, 4)).astype(np.float32)
places = np.tile(np.arange(9), (2, 1))
tensors = torch.from_numpy(x), torch.from_numpy(places)
ours = piece.torch(View(tokens=VisSeq(features=tensors[0], places=tensors[1])))
twin = piece.numpy(View(tokens=VisSeq(features=x, places=places)))
# Sums of four squares in float32, against float64.
np.testing.assert_allclose(ours.numpy(), twin, rtol=1e-5)
"""


def source_of(name: str) -> str:
    """The code block of the docs that begins with the name of a file."""
    found = re.search(rf"```python\n# {re.escape(name)}\n(.*?)```", DOCS, re.DOTALL)
    assert found is not None
    return found[1]


def installed(folder: Path) -> dict[str, str]:
    """Put the piece into a folder as pip would, and return the environment that finds it."""
    folder.joinpath("unlike.py").write_text(source_of("unlike.py"))
    data = folder / "unlike-1.0.dist-info"
    data.mkdir()
    data.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: unlike\nVersion: 1.0\n")
    entry = re.search(r"\[project.entry-points.\"edgevlm.reduce\"\]\n(.*?)```", DOCS, re.DOTALL)
    assert entry is not None
    lines = entry[1].replace('"', "")
    data.joinpath("entry_points.txt").write_text(f"[edgevlm.reduce]\n{lines}")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}


def test_the_scorer_of_the_docs_is_short_and_works(tmp_path: Path) -> None:
    assert len(source_of("unlike.py").splitlines()) < 60
    environment = installed(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=ROOT / "recipes" / "models" / "scenes-vlm"))
    planned = subprocess.run(
        [sys.executable, "-m", "edgevlm", "plan", str(recipe)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert planned.returncode == 0, planned.stderr
    assert "unlike+top" in planned.stdout
    checked = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_a_piece_that_is_not_installed_is_unknown(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=ROOT / "recipes" / "models" / "scenes-vlm"))
    planned = subprocess.run(
        [sys.executable, "-m", "edgevlm", "plan", str(recipe)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert planned.returncode == 2
    assert "unknown score 'unlike'" in planned.stderr
