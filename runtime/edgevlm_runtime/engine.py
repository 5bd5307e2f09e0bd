"""Engines: what runs a graph of a bundle.

An engine is a loaded graph. Arrays are bound to it once, which gives a `Call`; every `run` of the
call reads the bound inputs as they are then and writes the bound outputs in place. So the arrays
that live from token to token (state, a row of embeddings, logits) are bound once and never copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgevlm_runtime.errors import EngineError
from edgevlm_runtime.manifest import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from edgevlm_runtime.bundle import Bundle

Array = NDArray[Any]


class Call(Protocol):
    """A graph with its arrays bound."""

    def run(self) -> Mapping[str, Array]:
        """Run once and return the wanted outputs; bound ones are the arrays that were given."""
        ...


class Engine(Protocol):
    """A loaded graph."""

    @property
    def graph(self) -> GraphSpec:
        """What the manifest says about it."""
        ...

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array | None]) -> Call:
        """Bind arrays by graph names; `outputs` are those wanted, None where the engine allocates.

        An input that has a default value in the graph may be left out.
        """
        ...


def open_engine(bundle: Bundle, graph: GraphSpec) -> Engine:
    """Load a graph with the engine that its manifest entry names, or raise `EngineError`."""
    if graph.engine.kind == "ort":
        from edgevlm_runtime.engines.ort import OrtEngine

        return OrtEngine(bundle, graph)
    raise EngineError(
        f"graph {graph.name!r} wants engine {graph.engine.kind!r}, this runtime has 'ort'",
        hint="upgrade edgevlm-runtime, or compile for a target that it runs",
    )


def as_input(value: Array, tensor: TensorSpec) -> Array:
    """A value as a graph takes it: contiguous, in its dtype, and with the batch axis.

    The patches of a native picture come without that axis, as processors give them; whether a value
    lacks it is told by the number of its dimensions.
    """
    if value.ndim == len(tensor.shape) - 1:
        value = value[None]
    return np.ascontiguousarray(value, tensor.dtype)


class Engines:
    """The engines of a bundle: each graph is loaded when it is first asked for, and once."""

    def __init__(self, bundle: Bundle) -> None:
        """Load nothing yet."""
        self._bundle = bundle
        self._opened: dict[str, Engine] = {}

    def open(self, graph: GraphSpec) -> Engine:
        """The engine of a graph."""
        if graph.name not in self._opened:
            self._opened[graph.name] = open_engine(self._bundle, graph)
        return self._opened[graph.name]

    @property
    def names(self) -> tuple[str, ...]:
        """The graphs that are loaded."""
        return tuple(self._opened)
