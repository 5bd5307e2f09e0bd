"""The steps a recipe may name, one per file; `PASSES` is the only registry."""

from __future__ import annotations

from edgevlm.passes.awq import Awq
from edgevlm.passes.base import Applied, Change, Context, Foresight, Pass, run_pass, run_passes
from edgevlm.passes.fold_norms import FoldNorms
from edgevlm.passes.quantize import Quantize
from edgevlm.passes.reduce import Reduce
from edgevlm.passes.rotate import Rotate
from edgevlm.passes.smooth import Smooth

__all__ = [
    "PASSES",
    "Applied",
    "Awq",
    "Change",
    "Context",
    "FoldNorms",
    "Foresight",
    "Pass",
    "Quantize",
    "Reduce",
    "Rotate",
    "Smooth",
    "run_pass",
    "run_passes",
]

PASSES: dict[str, type[Pass]] = {
    step.name: step for step in (FoldNorms, Reduce, Awq, Smooth, Rotate, Quantize)
}
