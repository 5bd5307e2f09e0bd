"""Files of a bundle: found safely, mapped, and hashed before anybody reads them.

A bundle may come from anywhere, so a name in it is only a claim. A file is taken where its name is
relative and plain, where no part of its path is a symbolic link, and where it is a regular file
with one name (a hard link could be a file from outside the bundle; ONNX Runtime would load it).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgevlm_runtime.errors import BundleError
from edgevlm_runtime.manifest import FileEntry

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
_BLOCK_BYTES = 16 << 20

_RECOMPILE = "copy or compile the bundle again"
_FORBIDDEN = "a bundle holds plain files only; compile it again"


def read_manifest(folder: Path) -> bytes:
    """The bytes of `manifest.json`, which no hash covers."""
    if not folder.is_dir():
        raise BundleError(
            f"no bundle at {str(folder)!r}", hint="compile one: edgevlm compile RECIPE --out FOLDER"
        )
    size = _regular_file(folder, MANIFEST).st_size
    if size > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{MANIFEST} has {size} bytes, the limit is {MAX_MANIFEST_BYTES}", hint=_RECOMPILE
        )
    return (folder / MANIFEST).read_bytes()


def map_files(folder: Path, entries: Mapping[str, FileEntry]) -> dict[str, memoryview]:
    """Map every listed file, checked for size and sha256; refuse files that are not listed.

    Hashing is done by as many threads as there are cores, largest files first, and is complete
    when this returns: no parser sees a byte before.
    """
    for name in entries:
        _check_name(name)
    for name in sorted(_names_in(folder)):
        if name not in entries:
            raise BundleError(
                f"file {name!r} is not listed in {MANIFEST}",
                hint="remove it: what a bundle does not list could be loaded unchecked",
            )
    maps = {name: _map(folder, name, entry) for name, entry in entries.items()}
    largest_first = sorted(maps, key=lambda name: -len(maps[name]))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        digests = threads.map(lambda name: _digest(maps[name]), largest_first)
        for name, digest in zip(largest_first, digests, strict=True):
            if digest != entries[name].sha256:
                raise BundleError(
                    f"file {name!r} was altered: sha256 {digest}, listed {entries[name].sha256}",
                    hint=_RECOMPILE,
                )
    return maps


def _digest(mapped: memoryview) -> str:
    """The sha256 of a mapped file; what was read is let go at once, or all of it stays resident."""
    sha = hashlib.sha256()
    for start in range(0, len(mapped), _BLOCK_BYTES):
        block = mapped[start : start + _BLOCK_BYTES]
        sha.update(block)
        if isinstance(mapped.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.obj.madvise(mmap.MADV_DONTNEED, start, len(block))
    return sha.hexdigest()


def _check_name(name: str) -> None:
    """A relative path of plain parts, with `/` between them."""
    parts = name.split("/")
    if name == MANIFEST or any(
        part in ("", ".", "..") or not part.isprintable() or "\\" in part or ":" in part
        for part in parts
    ):
        raise BundleError(f"unsafe file name {name!r} in {MANIFEST}", hint=_FORBIDDEN)


def _names_in(folder: Path) -> list[str]:
    """Every file below the folder but the manifest, as manifest names; links are not followed."""
    names = []
    for root, directories, files in os.walk(folder):
        links = [name for name in directories if os.path.islink(os.path.join(root, name))]
        for name in (*files, *links):
            path = Path(root, name).relative_to(folder).as_posix()
            if path != MANIFEST:
                names.append(path)
    return names


def _regular_file(folder: Path, name: str) -> os.stat_result:
    """The status of a file that is safe to open."""
    path = folder
    for part in name.split("/"):
        path = path / part
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"file {name!r} is missing from {str(folder)!r}", hint=_RECOMPILE
            ) from None
        if stat.S_ISLNK(status.st_mode):
            raise BundleError(
                f"file {name!r} of the bundle is reached by a symbolic link", hint=_FORBIDDEN
            )
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"file {name!r} of the bundle is not a regular file", hint=_FORBIDDEN)
    if status.st_nlink != 1:
        raise BundleError(
            f"file {name!r} of the bundle is a hard link ({status.st_nlink} names)",
            hint="copy the bundle with its files, not with links",
        )
    return status


def _map(folder: Path, name: str, entry: FileEntry) -> memoryview:
    """Map a file of the listed size; what is mapped is the file whose status was checked."""
    checked = _regular_file(folder, name)
    if checked.st_size != entry.size:
        raise BundleError(
            f"file {name!r} has {checked.st_size} bytes, listed {entry.size}", hint=_RECOMPILE
        )
    with (folder / name).open("rb") as file:
        opened = os.fstat(file.fileno())
        if not os.path.samestat(checked, opened) or opened.st_size != entry.size:
            raise BundleError(f"file {name!r} changed while it was opened", hint=_RECOMPILE)
        if entry.size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
