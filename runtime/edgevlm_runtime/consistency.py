"""What must hold inside a manifest, beyond its structure: every name refers to something."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NoReturn

from edgevlm_runtime.errors import BundleError
from edgevlm_runtime.manifest import (
    DTYPE_BYTES,
    WEIGHTS,
    GraphSpec,
    Manifest,
    StateTensor,
    TensorSpec,
    Variant,
    carrier,
)

# Kinds of input sources, and what the part after the colon names.
SOURCES: Mapping[str, str | None] = {
    "pixels": None,
    "grid": None,
    "tokens": None,
    "embeds": None,
    "question_embeds": None,
    "question_weights": "kind",
    "row_weights": "kind",
    "picture_rows": None,
    "last_row": None,
    "rope_cos": "group",
    "rope_sin": "group",
    "row_valid": None,
    "logit_rows": None,
    "last_slot": "group",
    "total": "group",
    "used": "group",
    "mask": "group",
    "state": "state",
    "output": "output",
    "constant": "file",
}
# Sources that mean something without a name, too.
_ALSO_PLAIN = ("rope_cos", "rope_sin")
# Sources that are known where a whole prompt is read in one call.
_OF_PICTURES = ("picture_rows", "row_weights")
PICTURE = "picture"
PHASES = ("prefill", "decode", "verify", PICTURE)
MASKS = ("causal", "additive")
# A decoder keeps a position per row, from the start.
MAX_POSITIONS = 1 << 24


def check_manifest(manifest: Manifest) -> None:
    """Raise `BundleError` at the first name that leads nowhere or value that means nothing."""
    _known("default_variant", manifest.default_variant, manifest.variants, "variants")
    for name, variant in manifest.variants.items():
        _check_variant(f"variants.{name}", variant, manifest.files)


def _check_variant(place: str, variant: Variant, files: Collection[str]) -> None:
    groups = [group.name for group in variant.state]
    tensors = [tensor for group in variant.state for tensor in group.tensors]
    _unique(f"{place}.graphs", [graph.name for graph in variant.graphs])
    _unique(f"{place}.state", groups)
    _unique(f"{place}.state", [tensor.name for tensor in tensors])
    outputs = {output.name for graph in variant.graphs for output in graph.outputs}
    names: Mapping[str, Collection[str]] = {
        "group": set(groups),
        "state": {tensor.name for tensor in tensors},
        "output": outputs,
        "file": files,
        "kind": WEIGHTS,
    }
    for graph in variant.graphs:
        at = f"{place}.graphs[{graph.name}]"
        _check_graph(at, graph, files)
        for group in graph.dropped:
            _known(f"{at}.dropped", group, names["group"], "state groups")
        for tensor in graph.inputs:
            source_at = f"{at}.inputs[{tensor.name}].source"
            _check_source(source_at, tensor.source, names)
            kind = tensor.source.partition(":")[0]
            if kind in _OF_PICTURES and PICTURE not in graph.phases:
                _refuse(source_at, f"{kind!r} is only for graphs of the phase {PICTURE!r}")
    for state_group in variant.state:
        _positive(f"{place}.state[{state_group.name}].capacity", [state_group.capacity])
        for state in state_group.tensors:
            at = f"{place}.state[{state_group.name}].{state.name}"
            _known(f"{at}.dtype", state.dtype, DTYPE_BYTES, "dtypes")
            _positive(f"{at}.shape", state.shape)
            if not 0 <= state.axis < len(state.shape):
                _refuse(f"{at}.axis", f"{state.axis} is not an axis of {len(state.shape)}")
    for graph in variant.graphs:
        _check_state_of(f"{place}.graphs[{graph.name}]", graph, tensors)
    if not 0 < variant.max_positions <= MAX_POSITIONS:
        _refuse(
            f"{place}.max_positions", f"{variant.max_positions} is not from 1 to {MAX_POSITIONS}"
        )
    if variant.rope and variant.rope.sections:
        total, num = sum(variant.rope.sections), len(variant.rope.inv_freq)
        if total != num:
            _refuse(f"{place}.rope.sections", f"{total} frequencies are given of {num}")


def _check_graph(at: str, graph: GraphSpec, files: Collection[str]) -> None:
    _known(f"{at}.file", graph.file, files, "files")
    for weight in graph.weights:
        _known(f"{at}.weights", weight, files, "files")
    for phase in graph.phases:
        _known(f"{at}.phases", phase, PHASES, "phases")
    if PICTURE in graph.phases and len(graph.phases) > 1:
        _refuse(f"{at}.phases", f"{PICTURE!r} stands alone, got {list(graph.phases)}")
    _known(f"{at}.mask", graph.mask, MASKS, "masks")
    _positive(f"{at}.rows", [rows for rows in (graph.rows, graph.max_rows) if rows is not None])
    for kind, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        _unique(f"{at}.{kind}", [tensor.name for tensor in tensors])
        for tensor in tensors:
            _check_tensor(f"{at}.{kind}[{tensor.name}]", tensor)


def _check_state_of(at: str, graph: GraphSpec, tensors: Sequence[StateTensor]) -> None:
    """A graph that binds a state takes and gives it in the dtype in which it is allocated."""
    by_source = {f"state:{tensor.name}": tensor for tensor in tensors}
    bound = {spec.name: by_source[spec.source] for spec in graph.inputs if spec.source in by_source}
    renewed = {tensor.output: tensor for tensor in bound.values() if tensor.kind != "const"}
    for spec in graph.inputs:
        tensor = bound.get(spec.name)
        if tensor is not None and (tensor.shape, tensor.dtype) != (spec.shape, spec.dtype):
            _refuse(
                at,
                f"state {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"input {spec.name!r} takes {spec.dtype} {list(spec.shape)}",
            )
        _check_float8(at, spec, tensor)
    for spec in graph.outputs:
        tensor = renewed.get(spec.name)
        if tensor is not None and tensor.dtype != spec.dtype:
            _refuse(
                at, f"state {tensor.name!r} is {tensor.dtype}, output {spec.name!r} is {spec.dtype}"
            )
        _check_float8(at, spec, tensor)


def _check_float8(at: str, spec: TensorSpec, tensor: StateTensor | None) -> None:
    """What only engines compute with stays between them."""
    if tensor is None and carrier(spec.dtype) != spec.dtype:
        _refuse(at, f"{spec.name!r} is {spec.dtype}, which only state can be")


def _check_tensor(at: str, tensor: TensorSpec) -> None:
    _known(f"{at}.dtype", tensor.dtype, DTYPE_BYTES, "dtypes")
    _positive(f"{at}.shape", [dim for dim in tensor.shape if isinstance(dim, int)])


def _check_source(at: str, source: str, names: Mapping[str, Collection[str]]) -> None:
    kind, colon, argument = source.partition(":")
    _known(at, kind, SOURCES, "sources")
    refers_to = SOURCES[kind]
    if kind in _ALSO_PLAIN and not colon:
        return
    if (refers_to is None) == bool(colon):
        what = "takes no name" if refers_to is None else f"takes the name of a {refers_to}"
        _refuse(at, f"source {kind!r} {what}, got {source!r}")
    if refers_to:
        _known(at, argument, names[refers_to], f"{refers_to}s")


def _known(place: str, name: str, known: Collection[str], what: str) -> None:
    if name not in known:
        listed = ", ".join(sorted(map(repr, known))) if 0 < len(known) < 20 else f"{len(known)}"
        _refuse(place, f"{name!r} is not one of the {what} ({listed})")


def _unique(place: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            _refuse(place, f"{name!r} stands twice")
        seen.add(name)


def _positive(place: str, numbers: Iterable[int]) -> None:
    for number in numbers:
        if number < 1:
            _refuse(place, f"{number} is not positive")


def _refuse(place: str, message: str) -> NoReturn:
    raise BundleError(
        f"manifest.json: {place}: {message}",
        hint="compile the bundle again, or upgrade edgevlm-runtime",
    )
