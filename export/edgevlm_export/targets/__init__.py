"""Targets: what a graph may hold to run somewhere, and how it gets there. One file each."""

from __future__ import annotations

from edgevlm_export.targets.ort import ORT
from edgevlm_export.targets.static import STATIC
from edgevlm_export.targets.target import Target
from edgevlm_export.targets.tensorrt import TENSORRT

TARGETS: dict[str, Target] = {target.name: target for target in (ORT, STATIC, TENSORRT)}

__all__ = ["TARGETS", "Target"]
