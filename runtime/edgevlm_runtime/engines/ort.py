"""ONNX Runtime as an engine.

A graph is parsed from its verified bytes. Its weights are left in their file, which ONNX Runtime
maps by itself: giving it the weights in memory makes a second copy of them (1,036 MiB resident
instead of 533 for a graph of 480). Which weight files it may reach is settled before: it refuses
paths that leave the folder, `edgevlm_runtime.files` links and files that are not listed.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.engine import Array
from edgevlm_runtime.errors import EngineError
from edgevlm_runtime.manifest import GraphSpec, TensorSpec

_WEIGHT_FOLDER = "session.model_external_initializers_file_folder_path"
_ONLY_ERRORS = 3
_LEVELS = ("disable_all", "basic", "extended", "all")
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(float8e4m3fn)": "float8_e4m3fn",
    "tensor(float8e5m2)": "float8_e5m2",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


# Numbers of the types in ONNX, for those that numpy does not have.
_ONNX_TYPES = {"float8_e4m3fn": 17, "float8_e5m2": 19}


class OrtEngine:
    """A graph loaded by ONNX Runtime on the CPU."""

    def __init__(self, bundle: Bundle, graph: GraphSpec) -> None:
        """Load the graph, and check that it is the one that the manifest describes."""
        ort = _onnxruntime()
        options = session_options(ort, graph)
        if graph.weights:
            options.add_session_config_entry(
                _WEIGHT_FOLDER, str((bundle.path / graph.file).absolute().parent)
            )
        try:
            self._session = ort.InferenceSession(
                bytes(bundle.file(graph.file)), options, providers=["CPUExecutionProvider"]
            )
        except ort_errors() as error:
            _check_weights(bundle, graph)
            raise EngineError(
                f"onnxruntime {ort.__version__} cannot load graph {graph.name!r}: {error}",
                hint="compile the bundle again for this version, or install the one it names",
            ) from error
        _check_weights(bundle, graph)
        self.graph = graph
        optional = {node.name: node for node in self._session.get_overridable_initializers()}
        required = {node.name: node for node in self._session.get_inputs()}
        _check_nodes(graph, "input", graph.inputs, {**optional, **required}, set(required))
        outputs = {node.name: node for node in self._session.get_outputs()}
        _check_nodes(graph, "output", graph.outputs, outputs, set())

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]) -> OrtCall:
        """Bind arrays; an array that is given as input and as output is written in place."""
        return OrtCall(self._session, self.graph, inputs, outputs)


class OrtCall:
    """A session with its arrays bound."""

    def __init__(
        self,
        session: Any,
        graph: GraphSpec,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array | None],
    ) -> None:
        """Wrap every array as an OrtValue on the same memory."""
        self._binding = session.io_binding()
        self._run: Callable[[], None] = functools.partial(session.run_with_iobinding, self._binding)
        self._graph = graph
        self._bound = {name: array for name, array in outputs.items() if array is not None}
        self._made = [name for name, array in outputs.items() if array is None]
        self._order = list(outputs)
        # One value per array, so that in place is seen as in place. Not every one holds its array.
        self._held = (*inputs.values(), *self._bound.values())
        dtypes = {spec.name: spec.dtype for spec in (*graph.inputs, *graph.outputs)}
        self._values = {
            id(array): _ort_value(array, dtypes[name])
            for name, array in (*inputs.items(), *self._bound.items())
        }
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, self._values[id(array)])
        for name in outputs:
            if name in self._bound:
                self._binding.bind_ortvalue_output(name, self._values[id(self._bound[name])])
            else:
                self._binding.bind_output(name, "cpu")

    def run(self) -> Mapping[str, Array]:
        """Run once."""
        try:
            self._run()
        except ort_errors() as error:
            raise EngineError(f"graph {self._graph.name!r} cannot be run: {error}") from error
        if not self._made:
            return self._bound
        values = self._binding.get_outputs()
        made = {name: values[self._order.index(name)].numpy() for name in self._made}
        return {**self._bound, **made}


def _ort_value(array: Array, dtype: str) -> Any:
    """An OrtValue on the memory of an array, whose bytes may be of a type that numpy lacks."""
    wrap = _onnxruntime().OrtValue
    if dtype in _ONNX_TYPES:
        return wrap.ortvalue_from_numpy_with_onnx_type(array, _ONNX_TYPES[dtype])
    return wrap.ortvalue_from_numpy(array)


def _check_weights(bundle: Bundle, graph: GraphSpec) -> None:
    """Wait until the weights that were read are known to be those that were listed."""
    for name in graph.weights:
        bundle.file(name)


def _onnxruntime() -> types.ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            "onnxruntime is not installed",
            hint='pip install "edgevlm-runtime[cpu]"',
        ) from error
    module: types.ModuleType = onnxruntime
    return module


@functools.cache
def ort_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: a dozen classes of its own, without a common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [kind for kind in vars(state).values() if isinstance(kind, type)]
    return (RuntimeError, *(kind for kind in own if issubclass(kind, Exception)))


def session_options(ort: types.ModuleType, graph: GraphSpec) -> Any:
    """Options of the manifest: names with a dot are configuration entries, others are listed."""
    options = ort.SessionOptions()
    options.log_severity_level = _ONLY_ERRORS
    for name, value in graph.engine.options.items():
        if "." in name:
            options.add_session_config_entry(name, value)
        elif name in ("intra_op_num_threads", "inter_op_num_threads") and value.isdecimal():
            setattr(options, name, int(value))
        elif name == "graph_optimization_level" and value in _LEVELS:
            level = getattr(ort.GraphOptimizationLevel, f"ORT_{_level_name(value)}")
            options.graph_optimization_level = level
        else:
            raise EngineError(
                f"graph {graph.name!r} has engine option {name!r} = {value!r}, "
                "which the engine 'ort' does not know",
                hint="compile the bundle again, or upgrade edgevlm-runtime",
            )
    return options


def _level_name(value: str) -> str:
    return value.upper() if value == "disable_all" else f"ENABLE_{value.upper()}"


def _check_nodes(
    graph: GraphSpec,
    kind: str,
    specs: tuple[TensorSpec, ...],
    nodes: Mapping[str, Any],
    required: set[str],
) -> None:
    """The graph file and the manifest must agree on names, dtypes and fixed dimensions."""
    hint = "compile the bundle again, its manifest is of another graph"
    for name in required - {spec.name for spec in specs}:
        raise EngineError(f"graph {graph.name!r} has an {kind} {name!r} unlisted", hint=hint)
    for spec in specs:
        if spec.name not in nodes:
            raise EngineError(f"graph {graph.name!r} has no {kind} {spec.name!r}", hint=hint)
        node = nodes[spec.name]
        dtype, shape = _DTYPES.get(node.type, node.type), tuple(node.shape)
        fits = len(shape) == len(spec.shape) and all(
            theirs == ours or not isinstance(theirs, int) or not isinstance(ours, int)
            for theirs, ours in zip(shape, spec.shape, strict=True)
        )
        if dtype != spec.dtype or not fits:
            raise EngineError(
                f"graph {graph.name!r} has {kind} {spec.name!r} of {dtype} {list(shape)}, "
                f"listed {spec.dtype} {list(spec.shape)}",
                hint=hint,
            )
