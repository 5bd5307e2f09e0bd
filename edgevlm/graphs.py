"""The graph stage of a compile: capture, lower and write every graph of every variant.

All variants share one file of weights, in which every tensor stands once: the static graphs of
different row counts differ in their shapes alone, and both targets want the same transposed
matrices. A graph is captured once for each form and lowered to each target of that form.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgevlm.model.graphs import ModelGraph, delta_step, inplace_step, vision_graph
from edgevlm.model.vlm import Vlm
from edgevlm.plan import Plan, PlannedGraph, VariantPlan
from edgevlm.progress import Progress
from edgevlm.sizes import shares_table
from edgevlm_export.capture import capture
from edgevlm_export.lower import lower
from edgevlm_export.ops.packing import blocked, pack_bits
from edgevlm_export.targets import TARGETS
from edgevlm_export.write import WeightFile, write
from edgevlm_runtime.manifest import EngineSpec, GraphSpec, TensorSpec, Variant

WEIGHTS = "weights.bin"
EMBEDDING = "embedding.npy"
SCALES = "embedding.scales.npy"


def write_graphs(model: Vlm, plan: Plan, folder: Path, progress: Progress) -> None:
    """Write all graphs, their weights and the embedding table into an empty folder."""
    total = sum(len(variant.graphs) for variant in plan.variants)
    with (
        progress.stage("graphs", total) as advance,
        WeightFile(folder / WEIGHTS) as weights,
    ):
        for name, table in _tables(model):
            weights.write_table(table, folder / name)
        for variant in plan.variants:
            target = TARGETS[variant.target]
            for planned in variant.graphs:
                made = module_of(model, variant, planned)
                lowered = lower(capture(made.module, made.plan), target)
                write(lowered, folder / graph_file(variant, planned), weights)
                advance(1)


def _tables(model: Vlm) -> Iterator[tuple[str, np.ndarray]]:
    """The files of the embedding: rows, or codes and scales laid out as a head has them."""
    weight = model.embedding.get_parameter("weight").detach().numpy()
    scheme = model.spec.table
    if scheme is None:
        yield EMBEDDING, weight
        return
    weights = scheme.weights
    yield EMBEDDING, pack_bits(blocked(weight, weights.group_size), weights.bits)
    yield SCALES, model.embedding.get_parameter("scale").detach().numpy()


def module_of(model: Vlm, variant: VariantPlan, planned: PlannedGraph) -> ModelGraph:
    """The module that a planned graph is captured from."""
    capacity = variant.state[0].capacity
    if planned.form == "vision":
        num_images = planned.signature.inputs[0].shape[0]
        return vision_graph(
            model, planned.grid, num_images if isinstance(num_images, int) else None
        )
    if planned.form == "inplace":
        return inplace_step(model, capacity, planned.phases)
    assert planned.rows is not None, "a static step has a number of rows"
    return delta_step(model, capacity, planned.rows, planned.phases, planned.num_images)


def graph_file(variant: VariantPlan, planned: PlannedGraph) -> str:
    """The file of a graph, in the folder that also holds the weights."""
    return f"{variant.target}.{planned.name}.onnx"


def manifest_variant(plan: Plan, variant: VariantPlan) -> Variant:
    """What the manifest says of a variant."""
    target = TARGETS[variant.target]
    return Variant(
        target=variant.target,
        graphs=(
            _embedding(plan),
            *(
                GraphSpec(
                    name=planned.name,
                    role=planned.role,
                    file=graph_file(variant, planned),
                    engine=target.engine,
                    inputs=planned.signature.inputs,
                    outputs=planned.signature.outputs,
                    weights=_weights(plan, planned),
                    phases=planned.phases,
                    rows=planned.rows,
                    max_rows=planned.max_rows,
                    mask=planned.mask,
                    grid=planned.grid if len(plan.spec.vision.grids) > 1 else None,
                    dropped=planned.dropped,
                )
                for planned in variant.graphs
            ),
        ),
        state=variant.state,
        rope=plan.spec.decoder.rope,
        max_positions=plan.spec.decoder.max_positions,
    )


def _weights(plan: Plan, planned: PlannedGraph) -> tuple[str, ...]:
    """The files that hold a graph's tensors: a tied head lies in the embedding table."""
    if planned.role != "step" or not shares_table(plan.spec, planned.form):
        return (WEIGHTS,)
    return (WEIGHTS, EMBEDDING) if plan.spec.table is None else (WEIGHTS, EMBEDDING, SCALES)


def _embedding(plan: Plan) -> GraphSpec:
    decoder, table = plan.spec.decoder, plan.spec.table
    options = {}
    if table is not None:
        bits, size = table.weights.bits, table.weights.group_size
        options = {"bits": str(bits), "block_size": str(size)}
    return GraphSpec(
        name="embedding",
        role="embedding",
        file=EMBEDDING,
        engine=EngineSpec(kind="table", options=options),
        weights=() if table is None else (SCALES,),
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("T",), source="tokens"),),
        outputs=(TensorSpec(name="embeds", dtype="float32", shape=("T", decoder.width)),),
    )
