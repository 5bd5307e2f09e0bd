"""The stage cache: absent or whole, made once, never two values under one key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgevlm.cache import StageCache, code_version, digest, file_digest


def test_build_makes_once_and_finds_again(tmp_path: Path) -> None:
    cache = StageCache(root=tmp_path)
    calls: list[Path] = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "a.txt").write_text("whole")

    first = cache.build("lower", "k1", make)
    second = cache.build("lower", "k1", make)
    assert first == second == tmp_path / "lower" / "k1"
    assert (second / "a.txt").read_text() == "whole"
    assert len(calls) == 1


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = StageCache(root=tmp_path)

    def make(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cache.build("lower", "k1", make)
    assert cache.find("lower", "k1") is None
    assert [path for path in (tmp_path / "lower").iterdir() if path.is_dir()] == []


def test_a_killed_process_leaves_the_stage_absent(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from edgevlm.cache import StageCache\n"
        "def make(folder):\n"
        "    (folder / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "StageCache(root=Path(sys.argv[1])).build('lower', 'k1', make)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -9
    cache = StageCache(root=tmp_path)
    assert cache.find("lower", "k1") is None
    made = cache.build("lower", "k1", lambda folder: (folder / "a").write_text("x") and None)
    assert [path.name for path in made.iterdir()] == ["a"]


def test_prune_removes_what_was_unused_longest(tmp_path: Path) -> None:
    cache = StageCache(root=tmp_path, limit_bytes=150)
    for i, key in enumerate(("old", "middle", "new")):
        place = cache.build(
            "lower", key, lambda folder: (folder / "x").write_bytes(b"0" * 60) and None
        )
        os.utime(place, (i, i))
    cache.find("lower", "old")
    assert cache.prune() == 60
    assert cache.find("lower", "middle") is None
    assert cache.find("lower", "old") is not None
    assert cache.find("lower", "new") is not None


def test_digest_depends_on_values_and_not_on_order_of_keys() -> None:
    assert digest({"a": 1, "b": Path("x")}) == digest({"b": Path("x"), "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest(b"ab") != digest(b"ac")


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "f") == known


def test_code_version_is_a_digest_of_this_code() -> None:
    assert len(code_version()) == 64
