"""Where a failing graph parts from the model: each graph of a variant bisected on its examples."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edgevlm.evidence.bisect import Divergence, first_divergence, site_errors, site_outputs
from edgevlm.model.graphs import ModelGraph
from edgevlm_export.taps import tapped_sites, with_outputs


def find_fault(made: ModelGraph, path: Path, engine: Mapping[str, str]) -> Divergence | None:
    """Return the first site of a written graph that diverges from its module, if one does.

    `engine` are the options that the graph's engine is given.

    Both sides run the module's examples: seeded rows over a cache that already holds some, so that
    positions and state count.
    """
    modules = {name for name, _ in made.module.named_modules()}
    sites = [site for site in tapped_sites(ir.load(path)) if site in modules]
    inputs = {
        spec.name: np.ascontiguousarray(example.numpy())
        for spec, example in zip(made.plan.inputs, made.examples, strict=True)
    }

    def measure(wanted: Sequence[str]) -> dict[str, float]:
        reference = site_outputs(made.module, wanted, lambda: made.module(*made.examples))
        (found,) = tapped_runs(path, wanted, [inputs], engine)
        return site_errors(reference, found)

    return first_divergence(sites, measure)


def tapped_runs(
    path: Path,
    values: Sequence[str],
    calls: Sequence[Mapping[str, NDArray[np.generic]]],
    engine: Mapping[str, str],
) -> list[dict[str, NDArray[np.float32]]]:
    """Run a copy of a written graph whose outputs are these values; return them for each call.

    With the options of its engine: with others, other kernels would run.
    """
    options = ort.SessionOptions()
    for name, value in engine.items():
        options.add_session_config_entry(name, value)
    if not _rounds_blocks(ir.load(path)):
        # Packed copies of the weights would double the memory, for one run.
        options.add_session_config_entry("session.disable_prepacking", "1")
    # The copy lies beside the weights that it shares with the graph.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tapped-") as folder:
        copy = Path(folder) / path.name
        with_outputs(path, values, copy)
        session = ort.InferenceSession(copy, options, providers=["CPUExecutionProvider"])
        runs = [session.run(list(values), dict(inputs)) for inputs in calls]
    return [dict(zip(values, outputs, strict=True)) for outputs in runs]


def _rounds_blocks(model: ir.Model) -> bool:
    """Whether a product rounds activations block by block, which it leaves out unpacked."""
    return any(
        node.op_type == "MatMulNBits" and node.attributes["accuracy_level"].value == 4
        for node in model.graph
    )
