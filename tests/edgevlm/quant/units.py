"""The units of the small model, in the order in which they are quantized."""

from __future__ import annotations

UNITS = [
    "vision.layers.0",
    "vision.layers.1",
    "projector",
    "prefill.layers.0",
    "prefill.layers.1",
    "decoder.layers.0",
    "decoder.layers.1",
    "decoder.head",
]


def unit_of(site: str) -> str:
    return next(unit for unit in UNITS if site == unit or site.startswith(f"{unit}."))
