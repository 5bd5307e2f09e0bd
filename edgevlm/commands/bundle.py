"""What a bundle says of itself, as JSON and as tables: for `inspect`, `compile` and the demo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from edgevlm.commands.audit import audits_of
from edgevlm.commands.output import mebibytes, shape, table
from edgevlm.commands.plan import show_decisions
from edgevlm.commands.sites import show_audit_lines, show_losses, show_sites
from edgevlm.decisions import Decision
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.errors import BundleError
from edgevlm_runtime.manifest import Variant

__all__ = ["bundle_document", "show_bundle", "show_evidence"]


def bundle_document(bundle: Bundle) -> dict[str, Any]:
    """A bundle as JSON has it (`schemas/inspect.schema.json`)."""
    manifest = bundle.manifest
    provenance = manifest.provenance
    return {
        "bundle": str(bundle.path),
        "format_version": manifest.format_version,
        "name": manifest.name,
        "device": manifest.device,
        "model": manifest.model,
        "default_variant": manifest.default_variant,
        "variants": {
            name: {
                "target": variant.target,
                "graphs": [
                    {
                        "name": graph.name,
                        "role": graph.role,
                        "file": graph.file,
                        "engine": graph.engine.kind,
                        "phases": graph.phases,
                        "rows": graph.rows,
                        "grid": graph.grid,
                    }
                    for graph in variant.graphs
                ],
                "state": [
                    {
                        "name": group.name,
                        "capacity": group.capacity,
                        "tensors": len(group.tensors),
                        "bytes": group.nbytes,
                    }
                    for group in variant.state
                ],
            }
            for name, variant in manifest.variants.items()
        },
        "files": manifest.files,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "generation": manifest.generation,
        "recipe": provenance.get("recipe", {}),
        "versions": provenance.get("versions", {}),
        "changes": provenance.get("changes", []),
        "decisions": provenance.get("decisions", []),
        "evidence": provenance.get("evidence", {}),
    }


def show_bundle(bundle: Bundle, out: Console) -> None:
    """Print what a bundle holds, and the evidence for it.

    Raises BundleError where the provenance, which a runtime does not read and so does not check,
    is not as a compile writes it.
    """
    _show_contents(bundle, out)
    try:
        _show_provenance(bundle.manifest.provenance, out)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            "provenance in manifest.json is not as a compile writes it",
            hint="compile the bundle again, a manifest is not edited by hand",
        ) from error


def _show_contents(bundle: Bundle, out: Console) -> None:
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files.values())
    model = manifest.model
    revision = f" at {model.revision}" if model.revision else ""
    out.print(
        f"{manifest.name}  {model.source}{revision} ({model.family}) "
        f"for {manifest.device}, {len(manifest.files)} files, {mebibytes(size)}, all hashes right",
        style="bold",
    )
    for name, variant in manifest.variants.items():
        out.print()
        mark = " (default)" if name == manifest.default_variant else ""
        _show_variant(f"variant {name}{mark}", variant, out)


def _show_provenance(provenance: Mapping[str, Any], out: Console) -> None:
    if provenance.get("changes"):
        out.print()
        changes = table("changes", "pass", "sites", "skipped", "measures")
        for change in provenance["changes"]:
            measures = ", ".join(f"{name} {value:g}" for name, value in change["measures"].items())
            changes.add_row(
                change["pass"], str(len(change["sites"])), str(len(change["skipped"])), measures
            )
        out.print(changes)
    if provenance.get("decisions"):
        out.print()
        show_decisions([Decision(**decision) for decision in provenance["decisions"]], out)
    out.print()
    show_evidence(provenance, out)


def _show_variant(title: str, variant: Variant, out: Console) -> None:
    graphs = table(title, "graph", "role", "engine", "file", "first input", "first output")
    for graph in variant.graphs:
        graphs.add_row(
            graph.name,
            graph.role,
            graph.engine.kind,
            graph.file,
            f"{graph.inputs[0].name} {shape(graph.inputs[0].shape)}",
            f"{graph.outputs[0].name} {shape(graph.outputs[0].shape)}",
        )
    out.print(graphs)
    for group in variant.state:
        out.print(
            f"state {group.name}: {len(group.tensors)} tensors, {group.capacity} slots, "
            f"{mebibytes(group.nbytes)}"
        )


def show_evidence(provenance: Mapping[str, Any], out: Console) -> None:
    """Print the ladder: every rung under the one it was measured against."""
    evidence = provenance.get("evidence")
    if not evidence:
        out.print("no evidence: this bundle was not measured")
        return
    samples = evidence["samples"]
    ladder = table(
        f"evidence ({samples['count']} samples, {samples['weights']} weights)",
        "rung",
        "vision",
        "proj.",
        "logits",
        "KL",
        "argmax",
        "same",
        "score",
        "gates",
    )
    for depth, rung in _climbed(evidence["rungs"]):
        decoder, tokens = rung["decoder"], rung["tokens"]
        accuracy = rung["accuracy"].get("mean_accuracy")
        gates = rung["gates"]
        passed = sum(gate["passed"] for gate in gates)
        ladder.add_row(
            f"{' ' * depth}{rung['name']}",
            _error(rung["vision"]),
            _error(rung["projector"]),
            _error(decoder),
            "" if decoder is None else f"{decoder['kl']:.0e}",
            "" if decoder is None else f"{decoder['argmax']:.1%}",
            "" if tokens is None else f"{tokens['identical']}/{tokens['answers']}",
            "" if accuracy is None else f"{accuracy:.1%}",
            f"{passed}/{len(gates)}" if gates else "",
        )
    out.print(ladder)
    out.print(
        "vision, proj., logits: largest error, in units of max(1, std of the rung above)\n"
        "same: answers that are hf's token for token; gates: how many hold",
        style="dim",
    )
    for picture in samples["pictures"]:
        if picture["grid"] is not None:
            height, width = picture["grid"]
            out.print(f"vision grid {height} x {width}: {picture['count']} pictures", style="dim")
    for _, rung in _climbed(evidence["rungs"]):
        for gate in rung["gates"]:
            if gate["reason"]:
                out.print(f"{rung['name']}: {gate['name']} is loosened: {gate['reason']}")
    show_losses(evidence, out)
    show_sites(evidence.get("sites"), out)
    show_audit_lines(audits_of(provenance), out)


def _climbed(
    rungs: list[Mapping[str, Any]], parent: str | None = None, depth: int = 0
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The tree of rungs, children under their parent, with their depth."""
    for rung in rungs:
        if rung["parent"] == parent:
            yield depth, rung
            yield from _climbed(rungs, rung["name"], depth + 1)


def _error(agreement: Mapping[str, float] | None) -> str:
    return "" if agreement is None else f"{agreement['relative_error']:.0e}"
