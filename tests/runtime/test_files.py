"""Hashes of files: by sha256 as anybody would, in pieces where they are long."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgevlm_runtime import files
from edgevlm_runtime.errors import BundleError

README = Path(__file__).parents[2] / "runtime" / "README.md"
CONTENT = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 1,000 bytes, read 300 at a time."""
    monkeypatch.setattr(files, "_PIECE", 1000)
    monkeypatch.setattr(files, "_BLOCK", 300)


def test_a_short_file_has_its_sha256(tmp_path: Path) -> None:
    for size in (0, 1, 5000):
        (tmp_path / "f").write_bytes(CONTENT[:size])
        entry = files.entry_of(tmp_path / "f")
        assert entry.size == size
        assert entry.sha256 == hashlib.sha256(CONTENT[:size]).hexdigest()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("size", [1000, 1001, 2000, 4999])
def test_a_long_file_has_the_hash_of_its_pieces(tmp_path: Path, size: int) -> None:
    (tmp_path / "f").write_bytes(CONTENT[:size])
    content = CONTENT[:size]
    pieces = [hashlib.sha256(content[at : at + 1000]).digest() for at in range(0, size, 1000)]
    wanted = hashlib.sha256(b"".join(pieces)).hexdigest()
    entry = files.entry_of(tmp_path / "f")
    assert entry.sha256 == (wanted if size > 1000 else hashlib.sha256(content).hexdigest())


def test_a_long_file_can_be_verified_by_hand(tmp_path: Path) -> None:
    """The command that the format's page gives, on a file of one piece and a bit."""
    with (tmp_path / "f").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(0, 2)
        file.write(CONTENT)
    command = "split -b 64M --filter='openssl sha256 -binary' f | sha256sum"
    assert command.replace(" f ", " FILE ") in README.read_text()
    printed = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert printed.split()[0] == files.entry_of(tmp_path / "f").sha256


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("place", [0, 299, 1000, 2999, 4321])
def test_a_flip_in_any_piece_is_found(tmp_path: Path, place: int) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    entries = {"f": files.entry_of(tmp_path / "f")}
    assert bytes(files.BundleFiles(tmp_path, entries)["f"]) == CONTENT
    (tmp_path / "f").write_bytes(
        CONTENT[:place] + bytes([CONTENT[place] ^ 8]) + CONTENT[place + 1 :]
    )
    mapped = files.BundleFiles(tmp_path, entries)
    with pytest.raises(BundleError, match=r"^file 'f' was altered: sha256 "):
        mapped["f"]
