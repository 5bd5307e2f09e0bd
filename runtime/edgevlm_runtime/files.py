"""Files of a bundle: found safely, mapped, and hashed before anybody reads them.

A bundle may come from anywhere, so a name in it is only a claim. A file is taken where its name is
relative and plain, where no part of its path is a symbolic link, and where it is a regular file
with one name (a hard link could be a file from outside the bundle; ONNX Runtime would load it).

The hash of a file of up to 64 MiB is its sha256. A longer one is cut into pieces of 64 MiB, so that
all cores can work on one file of weights; its hash is the sha256 of the pieces' digests (32 bytes
each), one after the other. By hand:

    split -b 64M --filter='openssl sha256 -binary' FILE | sha256sum

No parser sees a byte that is not verified. The one thing that may begin earlier is that an engine
packs raw weights, which takes as long as hashing them; it is not handed out, nor is a session,
before their hash agrees.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

from edgevlm_runtime.errors import BundleError
from edgevlm_runtime.manifest import FileEntry

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20

# A part of the format: another size would be another hash.
_PIECE = 64 << 20
# Bytes read at a time.
_BLOCK = 1 << 20
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)

_RECOMPILE = "copy or compile the bundle again"
_FORBIDDEN = "a bundle holds plain files only; compile it again"


def read_manifest(folder: Path) -> bytes:
    """The bytes of `manifest.json`, which no hash covers."""
    if not folder.is_dir():
        raise BundleError(
            f"no bundle at {str(folder)!r}", hint="compile one: edgevlm compile RECIPE --out FOLDER"
        )
    if not os.path.lexists(folder / MANIFEST):
        raise BundleError(
            f"{str(folder)!r} is no bundle, it has no {MANIFEST}",
            hint="give the folder that `edgevlm compile` wrote",
        )
    size = _regular_file(folder, MANIFEST).st_size
    if size > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{MANIFEST} has {size} bytes, the limit is {MAX_MANIFEST_BYTES}", hint=_RECOMPILE
        )
    return (folder / MANIFEST).read_bytes()


class BundleFiles:
    """The listed files of a folder, mapped; each is handed out once its hash agrees.

    Hashing begins at once, in as many threads as there are cores, small files first.
    """

    def __init__(self, folder: Path, entries: Mapping[str, FileEntry]) -> None:
        """Open every file, and refuse what is not safe, not of its size, or not listed."""
        for name in entries:
            _check_name(name)
        for name in sorted(_names_in(folder)):
            if name not in entries:
                raise BundleError(
                    f"file {name!r} is not listed in {MANIFEST}",
                    hint="remove it: what a bundle does not list could be loaded unchecked",
                )
        self._entries = entries
        small_first = sorted(entries, key=lambda name: entries[name].size)
        opened = {name: _open(folder, name, entries[name]) for name in small_first}
        self._maps = {name: _mapped(file, entries[name].size) for name, file in opened.items()}
        threads = ThreadPoolExecutor(max_workers=os.cpu_count())
        self._digests = {
            name: _digests(file, entries[name].size, threads) for name, file in opened.items()
        }
        threads.shutdown(wait=False)

    def __getitem__(self, name: str) -> memoryview:
        """The bytes of a file, or BundleError where they are not those that were listed."""
        found, listed = _joined(self._digests[name]), self._entries[name].sha256
        if found != listed:
            raise BundleError(
                f"file {name!r} was altered: sha256 {found}, listed {listed}", hint=_RECOMPILE
            )
        return self._maps[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the files."""
        return iter(self._entries)


def entry_of(path: Path) -> FileEntry:
    """The size and hash of a file, as a manifest lists them."""
    size = path.stat().st_size
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        file = _OpenFile(os.open(path, os.O_RDONLY))
        return FileEntry(size=size, sha256=_joined(_digests(file, size, threads)))


class _OpenFile:
    """A file descriptor, closed when nobody holds it any more."""

    def __init__(self, number: int) -> None:
        self.number = number
        weakref.finalize(self, os.close, number)


def _digests(file: _OpenFile, size: int, threads: Executor) -> list[Future[bytes]]:
    """The digests of the pieces of a file, in order."""
    pieces = range(0, max(size, 1), _PIECE)
    return [threads.submit(_digest, file, begin) for begin in pieces]


def _digest(file: _OpenFile, begin: int) -> bytes:
    """The sha256 of one piece; reading is faster than mapping what is read only once."""
    sha, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    offset, end = begin, begin + _PIECE
    while count := os.preadv(file.number, [buffer[: end - offset]], offset):
        sha.update(buffer[:count])
        offset += count
    return sha.digest()


def _joined(pieces: list[Future[bytes]]) -> str:
    """The hash of a file, of the digests of its pieces."""
    digests = [piece.result() for piece in pieces]
    return digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()


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


def _open(folder: Path, name: str, entry: FileEntry) -> _OpenFile:
    """Open a file of the listed size: that one whose status was checked."""
    checked = _regular_file(folder, name)
    if checked.st_size != entry.size:
        raise BundleError(
            f"file {name!r} has {checked.st_size} bytes, listed {entry.size}", hint=_RECOMPILE
        )
    file = _OpenFile(os.open(folder / name, os.O_RDONLY | _NO_FOLLOW))
    opened = os.fstat(file.number)
    if not os.path.samestat(checked, opened) or opened.st_size != entry.size:
        raise BundleError(f"file {name!r} changed while it was opened", hint=_RECOMPILE)
    return file


def _mapped(file: _OpenFile, size: int) -> memoryview:
    """The file in memory; what nobody looks at is not resident."""
    if size == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(file.number, 0, access=mmap.ACCESS_READ))
