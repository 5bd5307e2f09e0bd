"""Writes graphs into a folder; every weight is stored once, whichever graphs use it.

A `WeightFile` is one file of raw tensors, each at a page boundary. A graph names its tensors there
by offset and length (ONNX external data), so graphs of different row counts and of different
targets share the bytes that are equal. Tensors are written one at a time, straight from where they
lie in memory, and are checked on the way: a NaN or an infinity is an error that names it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

from edgevlm_export.errors import ExportError

PAGE = 4096
INLINE_BYTES = 1024  # smaller tensors stay in the graph file


class WeightFile:
    """A file of tensors beside the graphs that use them; close it, or use it in a `with`."""

    def __init__(self, path: Path) -> None:
        """Create the file; it must not exist."""
        self.path = path
        self._file = path.open("xb")
        self._places: dict[bytes, Place] = {}

    def __enter__(self) -> WeightFile:
        """Keep the file open for a block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Make the bytes durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def write_table(self, table: np.ndarray, path: Path) -> None:
        """Write an `.npy` file, whose bytes graphs use where they have the same tensor."""
        with path.open("xb") as file:
            np.save(file, table, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        raw = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
        start = path.stat().st_size - raw.nbytes
        self._places[_key(raw)] = Place(path=path, offset=start, length=raw.nbytes)

    def place(self, raw: np.ndarray) -> Place:
        """Where these bytes are; they are appended unless they are there already."""
        key = _key(raw)
        place = self._places.get(key)
        if place is None:
            start = -(-self._file.tell() // PAGE) * PAGE
            self._file.write(b"\0" * (start - self._file.tell()))
            self._file.write(raw.data)
            place = Place(path=self.path, offset=start, length=raw.nbytes)
            self._places[key] = place
        return place


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A run of bytes in a file."""

    path: Path
    offset: int
    length: int


def write(model: ir.Model, path: Path, weights: WeightFile) -> None:
    """Write one graph to `path`, its larger tensors to `weights`; `model` stays as it is.

    The weights lie in the folder of the graph, or below it: ONNX Runtime reads no others.
    """
    folder = path.parent.resolve()
    written = model.clone()
    role = model.graph.name or path.stem
    for name, value in written.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None, f"initializer {name!r} has no value"
        raw = _raw(tensor, name, role)
        if raw.nbytes < INLINE_BYTES:
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
            continue
        place = weights.place(raw)
        value.const_value = ir.ExternalTensor(
            place.path.resolve().relative_to(folder).as_posix(),
            place.offset,
            place.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=folder,
        )
    with path.open("xb") as file:
        file.write(ir.to_proto(written).SerializeToString(deterministic=True))
        file.flush()
        os.fsync(file.fileno())


def _key(raw: np.ndarray) -> bytes:
    return hashlib.sha256(raw.data).digest()


def _raw(tensor: ir.TensorProtocol, name: str, role: str) -> np.ndarray:
    """The little-endian bytes of a tensor, without a copy where it lies in order."""
    array = np.ascontiguousarray(tensor.numpy())
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise ExportError(
            f"{name!r} holds {np.count_nonzero(~np.isfinite(array))} of {array.size} numbers that "
            "are NaN or infinite",
            role=role,
            hint="check the checkpoint, and the passes that touched this tensor",
        )
    if tensor.dtype.itemsize < 1:
        return np.frombuffer(tensor.tobytes(), dtype=np.uint8)
    return array.reshape(-1).view(np.uint8)
