"""The token embedding as a table: rows of a memory-mapped `.npy` file, no graph and no copy."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.lib import format as npy

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.engine import Array
from edgevlm_runtime.errors import BundleError, EngineError, InputError
from edgevlm_runtime.manifest import GraphSpec

# Longest header that numpy writes for a plain array, with room to spare.
_MAX_HEADER = 4096


class EmbeddingTable:
    """Rows [V, W] of the token embedding."""

    def __init__(self, table: Array) -> None:
        """Hold the mapped array."""
        self._table = table
        self.vocab_size = len(table)

    def rows(self, tokens: Sequence[int] | Array) -> Array:
        """Embeddings float32 [T, W] of ids [T], a copy; raises InputError at an unknown id."""
        ids = np.asarray(tokens)
        for token in (ids.min(), ids.max()):
            self._check(int(token))
        rows: Array = self._table[ids].astype(np.float32, copy=False)
        return rows

    def row(self, token: int) -> Array:
        """The embedding [1, W] of one token, in the dtype of the table and not copied."""
        self._check(token)
        return self._table[token : token + 1]

    def _check(self, token: int) -> None:
        # Numpy would take a negative id for one counted from the end.
        if not 0 <= token < self.vocab_size:
            raise InputError(f"token {token} is not one of the {self.vocab_size} of the embedding")


def open_table(bundle: Bundle, graph: GraphSpec) -> EmbeddingTable:
    """Open the embedding graph of a bundle, which must be of engine kind `table`."""
    if graph.engine.kind != "table":
        raise EngineError(
            f"embedding {graph.name!r} wants engine {graph.engine.kind!r}, not 'table'",
            hint="upgrade edgevlm-runtime, or compile for a target that it runs",
        )
    table = read_array(bundle, graph.file)
    if table.ndim != 2:
        raise BundleError(
            f"embedding table {graph.file!r} has shape {list(table.shape)}, not [tokens, width]",
            hint="compile the bundle again",
        )
    return EmbeddingTable(table)


def read_array(bundle: Bundle, name: str) -> Array:
    """An `.npy` file of the bundle as a read-only array on its mapped bytes."""
    data = bundle.file(name)
    head = io.BytesIO(bytes(data[:_MAX_HEADER]))
    try:
        version = npy.read_magic(head)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(head, max_header_size=_MAX_HEADER)
    except ValueError as error:
        raise BundleError(
            f"file {name!r} is not an array: {error}", hint="compile the bundle again"
        ) from error
    count = math.prod(shape)
    if dtype.hasobject or fortran or head.tell() + count * dtype.itemsize != len(data):
        raise BundleError(
            f"file {name!r} is not a plain array of {dtype} {list(shape)}",
            hint="compile the bundle again",
        )
    return np.frombuffer(data, dtype, count, head.tell()).reshape(shape)
