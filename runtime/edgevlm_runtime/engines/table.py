"""The token embedding as a table: rows of a memory-mapped `.npy` file, no graph and no copy.

A table of quantized rows is two files, codes and scales, laid out as com.microsoft::MatMulNBits has
them (`edgevlm_runtime.manifest`), so that a head that is the same matrix reads the same bytes.
"""

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
_MIN_BLOCK, _MAX_DIGITS = 16, 6


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


class QuantizedTable(EmbeddingTable):
    """Rows [V, W] as codes of 4 or 8 bits, a float32 scale for each block of a row."""

    def __init__(self, codes: Array, scales: Array, *, bits: int, width: int) -> None:
        """Hold the mapped arrays uint8 [V, B, bytes] and float32 [V, B]; W is at most B blocks."""
        super().__init__(codes)
        self._scales, self._width = scales[:, :, None], width
        byte, zero = np.arange(256), 1 << (bits - 1)
        halves = [byte & 15, byte >> 4] if bits == 4 else [byte]
        # What a byte stands for, one or two numbers, taken as one item: a look-up for each byte.
        numbers = np.stack([half - zero for half in halves], axis=-1).astype(np.float32)
        self._numbers = numbers.view(np.float64 if bits == 4 else np.float32).reshape(256)

    def rows(self, tokens: Sequence[int] | Array) -> Array:
        """Embeddings float32 [T, W] of ids [T]; raises InputError at an unknown id."""
        ids = np.asarray(tokens)
        for token in (ids.min(), ids.max()):
            self._check(int(token))
        numbers: Array = self._numbers.take(self._table[ids]).view(np.float32)
        numbers *= self._scales[ids]
        return numbers.reshape(len(ids), -1)[:, : self._width]

    def row(self, token: int) -> Array:
        """The embedding float32 [1, W] of one token."""
        self._check(token)
        # As few calls of numpy as there can be: this is done for every token.
        numbers: Array = self._numbers.take(self._table[token]).view(np.float32)
        numbers *= self._scales[token]
        return numbers.reshape(1, -1)[:, : self._width]


def open_table(bundle: Bundle, graph: GraphSpec) -> EmbeddingTable:
    """Open the embedding graph of a bundle, which must be of engine kind `table`."""
    if graph.engine.kind != "table":
        raise EngineError(
            f"embedding {graph.name!r} wants engine {graph.engine.kind!r}, not 'table'",
            hint="upgrade edgevlm-runtime, or compile for a target that it runs",
        )
    if graph.engine.options or graph.weights:
        return _open_quantized(bundle, graph)
    table = read_array(bundle, graph.file)
    if table.ndim != 2:
        raise BundleError(
            f"embedding table {graph.file!r} has shape {list(table.shape)}, not [tokens, width]",
            hint="compile the bundle again",
        )
    return EmbeddingTable(table)


def _open_quantized(bundle: Bundle, graph: GraphSpec) -> QuantizedTable:
    """Two files that fit the options, the width, and each other."""
    options = graph.engine.options
    bits, block = (_number(options.get(name, "")) for name in ("bits", "block_size"))
    is_known = set(options) == {"bits", "block_size"} and bits in (4, 8)
    if not is_known or block < _MIN_BLOCK or block & (block - 1):
        raise BundleError(
            f"embedding {graph.name!r} has options {dict(options)}, not bits 4 or 8 and a "
            f"block_size that is a power of two from {_MIN_BLOCK} on",
            hint="compile the bundle again, or upgrade edgevlm-runtime",
        )
    if len(graph.weights) != 1:
        raise BundleError(
            f"embedding {graph.name!r} of {bits} bits has {len(graph.weights)} weight files, "
            "not one of scales",
            hint="compile the bundle again",
        )
    width = graph.outputs[0].shape[-1] if graph.outputs and graph.outputs[0].shape else None
    if not isinstance(width, int):
        raise BundleError(
            f"embedding {graph.name!r} of {bits} bits has no output of a fixed width",
            hint="compile the bundle again",
        )
    blocks = -(-width // block)
    codes, scales = read_array(bundle, graph.file), read_array(bundle, graph.weights[0])
    vocabulary = len(codes) if codes.ndim else 0
    parts: tuple[tuple[str, Array, str, tuple[int, ...]], ...] = (
        (graph.file, codes, "uint8", (vocabulary, blocks, block * bits // 8)),
        (graph.weights[0], scales, "float32", (vocabulary, blocks)),
    )
    for name, array, dtype, shape in parts:
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            raise BundleError(
                f"embedding file {name!r} is {array.dtype} {list(array.shape)}, rows of {width} "
                f"in blocks of {block} are {dtype} {list(shape)}",
                hint="compile the bundle again",
            )
    return QuantizedTable(codes, scales, bits=bits, width=width)


def _number(text: str) -> int:
    """A whole number in plain digits, else 0."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < _MAX_DIGITS else 0


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
