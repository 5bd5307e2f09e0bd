"""Publishing a folder: built beside its place, put there by one rename, whole or not at all.

A second process that publishes to the same place fails at once and says who is at work. What a
killed process left beside the place is removed by the next one, which holds the lock.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from edgevlm_runtime.errors import ResourceError


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """Yield an empty staging folder; when the block ends without an error it becomes `out`.

    An earlier folder at `out` stays whole until then. Raises ResourceError where another process is
    publishing there, or where `out` is something that is not a bundle of ours.
    """
    out = out.absolute()
    _make_parents(out)
    _refuse_foreign(out)
    lock_path = out.with_name(f".{out.name}.lock")
    owner_path = out.with_name(f".{out.name}.owner")
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = owner_path.read_text().strip() if owner_path.exists() else "unknown"
        raise ResourceError(
            f"another compile is writing {str(out)!r} (process {owner})",
            hint="wait for it to end, or choose another output folder with --out",
        ) from None
    try:
        owner_path.write_text(f"{os.getpid()}\n")
        for kind in ("staging", "replaced"):
            for leftover in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
                shutil.rmtree(leftover)
        staging = out.with_name(f".{out.name}.staging-{os.getpid()}")
        staging.mkdir()
        try:
            yield staging
            sync(staging)
            _replace(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        owner_path.unlink(missing_ok=True)
        # While the lock is held: whoever opened the file meanwhile finds it gone, and tries again.
        lock_path.unlink(missing_ok=True)
        lock.release()


def sync(folder: Path) -> None:
    """Flush every file and folder below to the disk, so that the rename comes after its content."""
    for root, _, names in os.walk(folder):
        for name in [*names, "."]:
            _flush(Path(root, name))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(staging: Path, out: Path) -> None:
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    if out.exists():
        os.rename(out, replaced)
    try:
        os.rename(staging, out)
    except OSError:
        if replaced.exists():
            os.rename(replaced, out)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    _flush(out.parent)


def _make_parents(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ResourceError(
            f"the folder {str(out.parent)!r} cannot be made: a file is in its place",
            hint="choose another output folder",
        ) from None


def _refuse_foreign(out: Path) -> None:
    """A compile replaces bundles and nothing else: a typo must not cost somebody a folder."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise ResourceError(
            f"{str(out)!r} is there and is not a bundle", hint="choose another output folder"
        )
    if any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise ResourceError(
            f"{str(out)!r} is a folder with other files in it and no manifest.json",
            hint="choose another output folder",
        )
