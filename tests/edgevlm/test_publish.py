"""Publishing a folder: absent or whole, one writer at a time, nobody's files lost."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edgevlm.publish import publishing
from edgevlm_runtime.errors import ResourceError


def _publish(out: Path, text: str) -> None:
    with publishing(out) as staging:
        (staging / "manifest.json").write_text(text)


def test_the_folder_appears_whole_and_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    _publish(out, "one")
    assert (out / "manifest.json").read_text() == "one"
    with publishing(out) as staging:
        (staging / "manifest.json").write_text("two")
        assert (out / "manifest.json").read_text() == "one"
    assert (out / "manifest.json").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    _publish(out, "one")

    def fail_halfway() -> None:
        with publishing(out) as staging:
            (staging / "manifest.json").write_text("two")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert (out / "manifest.json").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_killed_process_leaves_no_folder_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from edgevlm.publish import publishing
        with publishing(Path(sys.argv[1])) as staging:
            (staging / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert subprocess.run([sys.executable, "-c", script, str(out)], check=False).returncode == -9
    assert not out.exists()
    assert any(".staging-" in path.name for path in tmp_path.iterdir())
    _publish(out, "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError) as error:
        _publish(tmp_path / "file" / "below" / "bundle", "one")
    assert str(error.value) == (
        f"the folder {str(tmp_path / 'file' / 'below')!r} cannot be made: a file is in its place\n"
        "  hint: choose another output folder"
    )


def test_a_second_writer_is_refused_and_told_who_is_at_work(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with publishing(out) as staging:
        (staging / "manifest.json").write_text("one")
        with pytest.raises(ResourceError) as refused:
            _publish(out, "two")
    assert str(refused.value) == (
        f"another compile is writing {str(out)!r} (process {os.getpid()})\n"
        "  hint: wait for it to end, or choose another output folder with --out"
    )
    assert (out / "manifest.json").read_text() == "one"


@pytest.mark.parametrize("kind", ["file", "symlink"])
def test_what_is_not_a_folder_is_not_replaced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "bundle"
    if kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(tmp_path)
    with pytest.raises(ResourceError) as refused:
        _publish(out, "one")
    assert str(refused.value) == (
        f"{str(out)!r} is there and is not a bundle\n  hint: choose another output folder"
    )


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("precious")
    with pytest.raises(ResourceError) as refused:
        _publish(out, "one")
    assert str(refused.value) == (
        f"{str(out)!r} is a folder with other files in it and no manifest.json\n"
        "  hint: choose another output folder"
    )
    assert (out / "chapter.tex").read_text() == "precious"
