"""The stage cache: every stage of a compile is stored under the hash of all that went into it.

A stage is a folder `ROOT/STAGE/KEY` that is either absent or whole: it is built beside its place
and renamed into it, so a compile that is killed resumes at its last finished stage. The key hashes
the inputs, the options and the code (`code_version`), so nothing here ever goes stale; entries that
have not been used for longest go first when the cache outgrows its limit.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

DEFAULT_LIMIT_BYTES = 30 * 2**30
_CODE_DISTRIBUTIONS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
_CODE_PACKAGES = ("edgevlm", "edgevlm_export", "edgevlm_runtime")
# The methods of reduction and lists of words are code, too.
_SOURCES = (".py", ".txt", ".yaml")


def default_root() -> Path:
    """Return the folder that compiles of this user share."""
    return Path.home() / ".cache" / "edgevlm"


def digest(*parts: Any) -> str:
    """Return the sha256 (hex) of the parts as canonical JSON; bytes go in by their own hash."""
    return hashlib.sha256(
        json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain).encode()
    ).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes, read in blocks (Python 3.10 lacks file_digest)."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return the hash of our own sources and of the versions of the libraries that shape graphs."""
    sources: dict[str, str] = {}
    for package in _CODE_PACKAGES:
        root = Path(__import__(package).__file__ or "").parent
        found = (path for suffix in _SOURCES for path in root.rglob(f"*{suffix}"))
        for path in sorted(found):
            sources[f"{package}/{path.relative_to(root)}"] = file_digest(path)
    versions = {}
    for name in _CODE_DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return digest(sources, versions)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCache:
    """A content-addressed folder of finished stages."""

    root: Path
    limit_bytes: int = DEFAULT_LIMIT_BYTES

    def find(self, stage: str, key: str) -> Path | None:
        """Return the folder of a finished stage, or None; finding it marks it as used."""
        place = self.root / stage / key
        if not place.is_dir():
            return None
        os.utime(place)
        return place

    def build(self, stage: str, key: str, make: Callable[[Path], None]) -> Path:
        """Return the stage's folder, calling `make(empty folder)` only where it is not there yet.

        Two processes that want the same stage wait for each other; the second finds it made.
        """
        place = self.root / stage / key
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_suffix(".lock")):
            found = self.find(stage, key)
            if found is not None:
                return found
            staging = Path(tempfile.mkdtemp(prefix=f".{key[:12]}-", dir=place.parent))
            try:
                make(staging)
                os.rename(staging, place)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
        return place

    def json(self, stage: str, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the JSON document of a stage, made where it is not there yet."""

        def write(folder: Path) -> None:
            (folder / "value.json").write_text(json.dumps(make(), sort_keys=True))

        loaded: dict[str, Any] = json.loads(
            (self.build(stage, key, write) / "value.json").read_text()
        )
        return loaded

    @contextmanager
    def workplace(self, stage: str, key: str) -> Iterator[Path]:
        """A folder in which a stage keeps what it has done so far.

        It is gone when the block ends without an error, and there again for the next attempt where
        it does not.
        """
        place = self.root / "work" / f"{stage}-{key}"
        place.mkdir(parents=True, exist_ok=True)
        yield place
        shutil.rmtree(place, ignore_errors=True)

    def prune(self) -> int:
        """Remove the entries unused for longest until the cache fits; return the bytes freed."""
        entries = [
            (entry.stat().st_mtime, _size(entry), entry)
            for stage in self._stages()
            for entry in stage.iterdir()
            if entry.is_dir()
        ]
        excess = sum(size for _, size, _ in entries) - self.limit_bytes
        freed = 0
        for _, size, entry in sorted(entries, key=lambda entry: entry[0]):
            if freed >= excess:
                break
            shutil.rmtree(entry, ignore_errors=True)
            freed += size
        return freed

    def _stages(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return [stage for stage in sorted(self.root.iterdir()) if stage.is_dir()]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _plain(value: Any) -> Any:
    """Turn what JSON lacks into what it has: models by their fields, paths and bytes by text."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, np.ndarray):
        return [value.dtype.str, list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "items"):
        return dict(value.items())
    raise TypeError(f"cannot hash a {type(value).__name__}")
