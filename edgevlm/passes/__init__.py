"""The steps a recipe may name, one per file; `PASSES` is the only registry."""

from __future__ import annotations

from edgevlm.passes.base import Applied, Change, Context, Foresight, Pass, run_pass, run_passes
from edgevlm.passes.fold_norms import FoldNorms
from edgevlm.passes.quantize import Quantize

__all__ = [
    "PASSES",
    "Applied",
    "Change",
    "Context",
    "FoldNorms",
    "Foresight",
    "Pass",
    "Quantize",
    "run_pass",
    "run_passes",
]

PASSES: dict[str, type[Pass]] = {step.name: step for step in (FoldNorms, Quantize)}
