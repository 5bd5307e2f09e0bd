"""The graph stage of a compile: capture, lower and write every graph of every variant.

All variants share one file of weights, in which every tensor stands once: the static graphs of
different row counts differ in their shapes alone, and both targets want the same transposed
matrices. A graph is captured once for each form and lowered to each target of that form.
"""

from __future__ import annotations

from pathlib import Path

from edgevlm.model.graphs import ModelGraph, delta_step, inplace_step, vision_graph
from edgevlm.model.vlm import Vlm
from edgevlm.plan import Plan, PlannedGraph, VariantPlan
from edgevlm.progress import Progress
from edgevlm_export.capture import capture
from edgevlm_export.lower import lower
from edgevlm_export.targets import TARGETS
from edgevlm_export.write import WeightFile, write
from edgevlm_runtime.manifest import EngineSpec, GraphSpec, TensorSpec, Variant

WEIGHTS = "weights.bin"
EMBEDDING = "embedding.npy"


def write_graphs(model: Vlm, plan: Plan, folder: Path, progress: Progress) -> None:
    """Write all graphs, their weights and the embedding table into an empty folder."""
    total = sum(len(variant.graphs) for variant in plan.variants)
    with (
        progress.stage("graphs", total) as advance,
        WeightFile(folder / WEIGHTS) as weights,
    ):
        table = model.embedding.get_parameter("weight")
        weights.write_table(table.detach().numpy(), folder / EMBEDDING)
        for variant in plan.variants:
            target = TARGETS[variant.target]
            for planned in variant.graphs:
                made = module_of(model, variant, planned)
                lowered = lower(capture(made.module, made.plan), target)
                write(lowered, folder / graph_file(variant, planned), weights)
                advance(1)


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
    return delta_step(model, capacity, planned.rows, planned.phases)


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
    shares_table = planned.role == "step" and plan.spec.decoder.tied
    return (WEIGHTS, EMBEDDING) if shares_table else (WEIGHTS,)


def _embedding(plan: Plan) -> GraphSpec:
    decoder = plan.spec.decoder
    return GraphSpec(
        name="embedding",
        role="embedding",
        file=EMBEDDING,
        engine=EngineSpec(kind="table"),
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("T",), source="tokens"),),
        outputs=(TensorSpec(name="embeds", dtype="float32", shape=("T", decoder.width)),),
    )
