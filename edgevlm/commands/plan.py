"""`edgevlm plan`: the plan of a recipe, as tables or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from edgevlm.commands.output import console, marked, mebibytes, print_json, shape, table
from edgevlm.decisions import Decision, refuse
from edgevlm.plan import Plan, VariantPlan, recipe_plan
from edgevlm.recipe import load_recipe


def plan_command(path: Path, *, as_json: bool) -> None:
    """Plan a recipe and show it; exit 3 where something asked for is refused."""
    plan = recipe_plan(load_recipe(path))
    if as_json:
        print_json(plan_document(plan))
    else:
        show_plan(plan, console())
    refuse(plan.decisions)


def plan_document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it (`schemas/plan.schema.json`)."""
    tokens = plan.tokens
    return {
        "recipe": str(plan.recipe.path),
        "model": plan.recipe.model,
        "family": plan.spec.family,
        "device": plan.device.name,
        "dtype": plan.dtype,
        "parameters": {**_fields(plan.parameters), "total": plan.parameters.total},
        "tokens": {
            "per_call": [
                {"grid": list(grid), "tokens": count} for grid, count in tokens.per_call.items()
            ],
            "largest_picture": tokens.largest_picture,
            "capacity": tokens.capacity,
            "max_new_tokens": tokens.max_new_tokens,
            "prompt": tokens.prompt,
        },
        "variants": [_variant_document(variant) for variant in plan.variants],
        "decisions": [_fields(decision) for decision in plan.decisions],
    }


def _variant_document(variant: VariantPlan) -> dict[str, Any]:
    return {
        "target": variant.target,
        "graphs": [
            {
                "name": graph.name,
                "role": graph.role,
                "form": graph.form,
                "phases": graph.phases,
                "rows": graph.rows,
                "max_rows": graph.max_rows,
                "grid": graph.grid,
                "inputs": [_fields(tensor) for tensor in graph.signature.inputs],
                "outputs": [_fields(tensor) for tensor in graph.signature.outputs],
            }
            for graph in variant.graphs
        ],
        "state": [
            {
                "name": group.name,
                "capacity": group.capacity,
                "tensors": [_fields(tensor) for tensor in group.tensors],
            }
            for group in variant.state
        ],
        "memory_bytes": {**_fields(variant.memory), "total": variant.memory.total},
    }


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def show_plan(plan: Plan, out: Console) -> None:
    """Print the plan."""
    tokens = plan.tokens
    out.print(
        f"{plan.recipe.model} ({plan.spec.family}, "
        f"{plan.parameters.total / 1e6:,.1f} M parameters) for {plan.device.name}",
        style="bold",
    )
    calls = ", ".join(
        f"{count} tokens for {grid[0]} x {grid[1]} patches"
        for grid, count in tokens.per_call.items()
    )
    out.print(f"pictures  {calls}; one picture is at most {tokens.largest_picture} rows")
    out.print(
        f"context   {tokens.capacity} rows; with one picture and {tokens.max_new_tokens} rows of "
        f"answer, {tokens.prompt} are left for text"
    )
    for variant in plan.variants:
        _show_variant(variant, out)
    out.print()
    show_decisions(plan.decisions, out)


def _show_variant(variant: VariantPlan, out: Console) -> None:
    out.print()
    graphs = table(f"variant {variant.target}", "graph", "serves", "input", "shape", "output")
    for graph in variant.graphs:
        # The state has a line of its own below: it is the same for all step graphs.
        inputs = [tensor for tensor in graph.signature.inputs if "state:" not in tensor.source]
        first, *rest = inputs
        output = graph.signature.outputs[0]
        serves = ", ".join(graph.phases) or graph.role
        graphs.add_row(
            graph.name,
            serves,
            first.name,
            shape(first.shape),
            f"{output.name} {shape(output.shape)}",
        )
        for tensor in rest:
            graphs.add_row("", "", tensor.name, shape(tensor.shape), "")
    out.print(graphs)
    memory = variant.memory
    for group in variant.state:
        out.print(
            f"state     {len(group.tensors)} tensors like {shape(group.tensors[0].shape)}, "
            f"{group.tensors[0].kind}, {mebibytes(memory.state)}"
        )
    out.print(
        f"memory    up to {mebibytes(memory.total)}: weights {mebibytes(memory.weights)}, "
        f"packed copies {mebibytes(memory.packed)}, embedding {mebibytes(memory.embedding)}, "
        f"activations {mebibytes(memory.activations)}"
    )


def show_decisions(decisions: Sequence[Decision], out: Console) -> None:
    """Print what became of each wish."""
    shown = table("decisions", "asked", "outcome", "because", "effect")
    for decision in decisions:
        shown.add_row(decision.asked, marked(decision.outcome), decision.reason, decision.effect)
    out.print(shown)
