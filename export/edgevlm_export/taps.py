"""Taps: values inside a written graph made visible as outputs, to find where it diverges."""

from __future__ import annotations

import json

import onnx_ir as ir

TAP = "edgevlm.tap."  # prefix of metadata keys


def record_tap(model: ir.Model, site: str, op_type: str, *inputs: str) -> None:
    """Note how the output of a site is computed from values that the graph still has.

    A graph output keeps its own name (Identity), and a bias that was fused into a later node leaves
    the site's value without it (Add).
    """
    model.metadata_props[TAP + site] = json.dumps({"op": op_type, "inputs": list(inputs)})
