"""`edgevlm plan`: the plan of a recipe, as tables or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console

from edgevlm.commands.output import (
    console,
    counted,
    marked,
    mebibytes,
    print_json,
    shape,
    table,
)
from edgevlm.decisions import Decision, refuse
from edgevlm.plan import Plan, VariantPlan, recipe_plan
from edgevlm.recipe import load_recipe
from edgevlm.reduce.cost import Cost
from edgevlm.tokens import TokenPlan


def plan_command(path: Path, *, text_rows: int | None, as_json: bool) -> None:
    """Plan a recipe and show it; exit 3 where something asked for is refused."""
    plan = recipe_plan(load_recipe(path), text_rows)
    if as_json:
        print_json(plan_document(plan))
    else:
        show_plan(plan, console())
    refuse(plan.decisions)


def plan_document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it (`schemas/plan.schema.json`)."""
    return {
        "recipe": str(plan.recipe.path),
        "model": plan.recipe.model,
        "family": plan.spec.family,
        "device": plan.device.name,
        "dtype": plan.dtype,
        "parameters": {**_fields(plan.parameters), "total": plan.parameters.total},
        "tokens": _token_document(plan.tokens),
        "variants": [_variant_document(variant) for variant in plan.variants],
        "decisions": [_fields(decision) for decision in plan.decisions],
    }


def _token_document(tokens: TokenPlan) -> dict[str, Any]:
    return {
        "per_call": [
            {"grid": list(grid), "tokens": count} for grid, count in tokens.per_call.items()
        ],
        "largest_picture": tokens.largest_picture,
        "capacity": tokens.capacity,
        "max_new_tokens": tokens.max_new_tokens,
        "prompt": tokens.prompt,
        "layers": list(tokens.layers),
        "average": tokens.average,
        "dense": tokens.dense_tokens,
        "segments": [_fields(segment) for segment in tokens.segments],
        "cost": {
            "grid": list(tokens.priced.grid),
            "pictures": tokens.priced.groups,
            "text_rows": tokens.text_rows,
            "marks": tokens.priced.text_rows - tokens.text_rows,
            "reduced": _cost_document(tokens.cost),
            "dense": _cost_document(tokens.dense or tokens.cost),
            "percent": tokens.percent,
        },
    }


def _cost_document(cost: Cost) -> dict[str, int]:
    return {**_fields(cost), "total": cost.total}


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
    is_hidden = any(segment.kept < segment.tokens for segment in tokens.segments)
    where = " of the context" if is_hidden else ""
    out.print(f"pictures  {calls}; one picture is at most {tokens.largest_picture} rows{where}")
    out.print(
        f"context   {tokens.capacity} rows; with one picture and {tokens.max_new_tokens} rows of "
        f"answer, {tokens.prompt} are left for text"
    )
    _show_tokens(tokens, out)
    for variant in plan.variants:
        _show_variant(variant, out)
    out.print()
    show_decisions(plan.decisions, out)


def _show_tokens(tokens: TokenPlan, out: Console) -> None:
    """The layers that see the same rows, and what a prompt costs."""
    cost, percent = tokens.cost, tokens.percent
    unit = "picture" if tokens.priced.groups == 1 else "tile"
    out.print()
    columns = "layers", f"tokens per {unit}", "rows of the prompt", "positions", "state", "slots"
    shown = table("visual tokens", *columns)
    for segment in tokens.segments:
        first, last = segment.first, segment.end - 1
        shown.add_row(
            str(first) if first == last else f"{first}-{last}",
            str(segment.tokens),
            str(segment.rows),
            segment.positions,
            segment.group,
            str(segment.capacity),
        )
    out.print(shown)
    out.print(f"prompt    {_pictures(tokens)} and {tokens.text_rows} rows of text")

    def share(part: str, of: str = "") -> str:
        return "" if percent is None else f" ({percent[part]:.1f} %{of})"

    of = f" of {tokens.dense_tokens}"
    out.print(f"average   {tokens.average:.1f} visual tokens a layer{share('average_tokens', of)}")
    out.print(
        f"compute   vision {counted(cost.vision)}{share('vision')}, projector "
        f"{counted(cost.projector)}{share('projector')}, prefill {counted(cost.prefill)} "
        f"multiply-adds{share('prefill', ' of dense')}"
    )
    if percent is not None:
        out.print(
            f"choosing  {counted(cost.choosing)} multiply-adds; all together "
            f"{counted(cost.total)}{share('total', ' of dense')}"
        )
    out.print(
        f"cache     {mebibytes(cost.kv_bytes)}, {counted(cost.kv_numbers)} keys and values of the "
        f"prompt{share('kv', ' of dense')}"
    )
    whole = tokens.segments[0]
    if whole.kept < whole.tokens:
        out.print(
            f"hidden    {whole.tokens - whole.kept} of the {whole.tokens} rows of a {unit} pass "
            f"all layers once; the cache keeps {whole.kept}"
        )


def _pictures(tokens: TokenPlan) -> str:
    """The picture of the prompt whose cost is told."""
    if tokens.priced.groups > 1:
        return f"one picture of {tokens.priced.groups} tiles"
    if len(tokens.per_call) > 1:
        return "one picture of {} x {} patches".format(*tokens.priced.grid)
    return "one picture"


def _show_variant(variant: VariantPlan, out: Console) -> None:
    out.print()
    graphs = table(f"variant {variant.target}", "graph", "serves", "input", "shape", "output")
    for graph in variant.graphs:
        # The state has a line of its own below: it is the same for all step graphs.
        inputs = [tensor for tensor in graph.signature.inputs if "state:" not in tensor.source]
        outputs = graph.signature.outputs
        shown = outputs if graph.role == "vision" else outputs[:1]
        for number, (given, made) in enumerate(zip_longest(inputs, shown)):
            graphs.add_row(
                "" if number else graph.name,
                "" if number else ", ".join(graph.phases) or graph.role,
                *("", "") if given is None else (given.name, shape(given.shape)),
                "" if made is None else f"{made.name} {shape(made.shape)}",
            )
    out.print(graphs)
    memory = variant.memory
    for group in variant.state:
        out.print(
            f"state     {len(group.tensors)} tensors like {shape(group.tensors[0].shape)}, "
            f"{group.tensors[0].kind}, {mebibytes(group.nbytes)}"
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
