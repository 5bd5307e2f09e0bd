"""A written graph as ONNX Runtime loads it and runs it: its optimized form, and a profile.

The graph is loaded as the runtime loads it, from its bytes and with the options of its manifest, so
that the same optimizers run and the same kernels are chosen. One session does everything, because
each holds a packed copy of the weights.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edgevlm_runtime.engines import ort as ort_engine
from edgevlm_runtime.engines.ort import OrtCall, ort_errors
from edgevlm_runtime.errors import EngineError
from edgevlm_runtime.manifest import GraphSpec

__all__ = ["KernelTime", "Observation", "RefusalError", "observe", "session_options"]

EMBEDDED_BYTES = 1 << 26
"""Of more constants than this that it makes itself, ONNX Runtime writes a file of their own.

That is a copy of all weights, and a file of protobuf messages ends at 2 GiB.
"""

_FLOAT_BYTES = 4
_SILENT = 4  # what goes wrong is in the report
_WEIGHT_FOLDER = "session.model_external_initializers_file_folder_path"
_NEW_WEIGHTS = "session.optimized_model_external_initializers_file_name"
_PREFIX = re.compile(
    r"^(graph '.*' cannot be run: )?(Error in execution: )?(\[ONNXRuntimeError\] : \d+ : \w+ : )?"
)
_KERNEL = "_kernel_time"  # what events of kernels are named, behind the name of the node

Feeds = Mapping[str, NDArray[Any]]


class RefusalError(EngineError):
    """ONNX Runtime cannot load or run the graph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTime:
    """A node in the profile: the op that ran, its median time, the bytes it read and wrote."""

    op_type: str
    microseconds: float
    activation_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """The optimized graph, the kernels that ran by the names of their nodes, and a whole run."""

    model: ir.Model
    kernels: Mapping[str, KernelTime]
    microseconds: float


def session_options(graph: GraphSpec) -> Any:
    """The options that the runtime gives a session of this graph."""
    return ort_engine.session_options(ort, graph)


@contextlib.contextmanager
def observe(
    path: Path,
    graph: GraphSpec,
    feeds: Feeds,
    *,
    in_place: Mapping[str, str],
    runs: int,
    embedded_bytes: int = EMBEDDED_BYTES,
) -> Iterator[Observation]:
    """Load and run a written graph, once more than `runs`; its files lie beside it for a block.

    `in_place` maps outputs to the inputs that they are written over; `feeds` stay as they are.
    Raises RefusalError.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".audit-") as folder:
        optimized = Path(folder) / path.name
        options = session_options(graph)
        options.log_severity_level = _SILENT
        options.add_session_config_entry(_WEIGHT_FOLDER, str(path.parent.absolute()))
        options.optimized_model_filepath = str(optimized)
        is_large = _bytes_of_new_constants(ir.load(path)) > embedded_bytes
        if is_large:
            options.add_session_config_entry(_NEW_WEIGHTS, f"{path.name}.weights")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        refusals: tuple[type[Exception], ...] = (EngineError, *ort_errors())
        try:
            profile = _run(path.read_bytes(), options, graph, feeds, in_place, runs)
        except refusals as error:
            raise RefusalError(_clause(error)) from error
        events = json.loads(Path(profile).read_bytes())
        model = ir.load(optimized)
        if not is_large:
            # Constants that ONNX Runtime left alone still lie in the file of the written graph.
            ir.external_data.set_base_dir(model.graph, path.parent)
        runs_us = [event["dur"] for event in events if event["name"] == "model_run"]
        yield Observation(
            model=model,
            kernels=_kernel_times(events),
            microseconds=statistics.median(runs_us[1:]),
        )


def _run(
    model: bytes,
    options: Any,
    graph: GraphSpec,
    feeds: Feeds,
    in_place: Mapping[str, str],
    runs: int,
) -> str:
    """Load, run, and return the path of the profile."""
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
    arrays |= {name: arrays[name].copy() for name in in_place.values()}
    names = [output.name for output in session.get_outputs()]
    outputs = {name: arrays[in_place[name]] if name in in_place else None for name in names}
    call = OrtCall(session, graph, arrays, outputs)
    for _ in range(1 + runs):
        call.run()
    profile: str = session.end_profiling()
    return profile


def _kernel_times(events: list[dict[str, Any]]) -> dict[str, KernelTime]:
    """Medians over all runs but the first, which also fills caches and arenas."""
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            found.setdefault(event["name"].removesuffix(_KERNEL), []).append(event)
    return {
        name: KernelTime(
            op_type=several[-1]["args"]["op_name"],
            microseconds=statistics.median([event["dur"] for event in several[1:]]),
            activation_bytes=int(several[-1]["args"]["activation_size"])
            + int(several[-1]["args"]["output_size"]),
        )
        for name, several in found.items()
    }


def _bytes_of_new_constants(model: ir.Model) -> int:
    """At most so many bytes of constants does ONNX Runtime make of those in the file.

    It folds nodes that read nothing but constants, some to floats of weights in fewer bits, and it
    makes unsigned weights of signed ones.
    """
    total = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.is_graph_input():
            continue
        folds = any(
            all(other is None or other.is_initializer() for other in user.inputs)
            for user in value.consumers()
        )
        size = math.prod(tensor.shape.numpy())
        total += _FLOAT_BYTES * size if folds else size * (tensor.dtype == ir.DataType.INT8)
    return total


def _clause(error: Exception) -> str:
    """The first line of what ONNX Runtime says, without its numbers."""
    return _PREFIX.sub("", str(error).splitlines()[0]).rstrip(". ")
