"""The command line: usage, exit codes, and the text of errors."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from edgevlm import cli
from edgevlm.cli import run
from edgevlm.commands.progress import Lines
from edgevlm.errors import DeviceError, EvidenceError, RecipeError
from edgevlm.resources import schema_file
from edgevlm_runtime.errors import BundleError, EngineError, InputError, ResourceError

VERBS = ("compile", "plan", "run", "eval", "inspect", "devices", "doctor")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_lists_verbs_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "--help")
    assert code == 0
    for verb in VERBS:
        assert f"│ {verb} " in out, verb
    for line in cli.EXIT_CODES.splitlines():
        assert f" {line} " in out, line


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_json_and_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, verb, "--help")
    assert code == 0
    assert "--json" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from edgevlm import __version__

    assert printed(capsys, "--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compil"], "error: no such command 'compil'\n  hint: did you mean 'compile'?\n"),
        (["plan"], "error: missing argument 'RECIPE'\n  hint: see 'edgevlm plan --help'\n"),
        (
            ["plan", "--josn", "x.yaml"],
            "error: no such option: --josn (Possible options: --json)\n"
            "  hint: see 'edgevlm plan --help'\n",
        ),
        (
            ["plan", "nowhere/x.yaml"],
            "error: nowhere/x.yaml: no such file or directory\n"
            "  hint: name a YAML file; there is no folder 'nowhere'\n",
        ),
        (
            ["devices", "host-cp"],
            "error: unknown device 'host-cp'\n  hint: did you mean 'host-cpu'?\n",
        ),
        (
            ["eval", "x", "--against", "gguf"],
            "error: --against 'gguf' is not known\n  hint: use --against hf\n",
        ),
        (
            ["eval", "x", "--checkpoint", "y"],
            "error: --checkpoint is given without --against\n  hint: add --against hf\n",
        ),
    ],
)
def test_usage_errors(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(capsys, *arguments) == (2, "", expected)


def test_no_arguments_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = printed(capsys)
    assert code == 2
    assert "Usage: edgevlm" in out + err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            RecipeError("bad", path="a.yaml", line=1, column=2, hint="mend it"),
            2,
            "error: a.yaml:1:2: bad\n  hint: mend it\n",
        ),
        (InputError("bad prompt"), 2, "error: bad prompt\n"),
        (DeviceError("lacks it"), 3, "error: lacks it\n"),
        (EngineError("no engine"), 3, "error: no engine\n"),
        (EvidenceError("differs", rung="ort"), 4, "error: differs\n"),
        (BundleError("altered"), 5, "error: altered\n"),
        (ResourceError("locked"), 6, "error: locked\n"),
        (MemoryError(), 6, "error: out of memory\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "build/x"),
            6,
            "error: no space left for 'build/x'\n  hint: free some space\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/root/x"),
            6,
            "error: no permission for '/root/x'\n"
            "  hint: change its permissions, or choose another place\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_become_exit_codes(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(name: str | None, *, as_json: bool) -> None:
        raise error

    monkeypatch.setattr("edgevlm.commands.devices.devices_command", fail)
    assert printed(capsys, "devices") == (code, "", text)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str | None, *, as_json: bool) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("edgevlm.commands.devices.devices_command", fail)
    with pytest.raises(ZeroDivisionError):
        run(["devices"])


def test_a_bug_exits_with_1() -> None:
    code = (
        "import edgevlm.commands.devices as m\n"
        "def fail(name, *, as_json): raise ZeroDivisionError('a bug')\n"
        "m.devices_command = fail\n"
        "import sys; sys.argv = ['edgevlm', 'devices']\n"
        "from edgevlm.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: a bug\n")


def test_traceback_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = printed(capsys, "--traceback", "plan", "no/x.yaml")
    assert code == 2
    assert err.startswith("Traceback")
    assert err.endswith("\n  hint: name a YAML file; there is no folder 'no'\n")


def test_ctrl_c_ends_with_130() -> None:
    # A test run that a shell started in the background has inherited that SIGINT is ignored.
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import edgevlm.commands.devices as m\n"
        "def wait(name, *, as_json): print('ready', flush=True); time.sleep(60)\n"
        "m.devices_command = wait\n"
        "sys.argv = ['edgevlm', 'devices']\n"
        "from edgevlm.cli import main; main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_a_closed_pipe_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "edgevlm", "devices", "--json"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_devices_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(schema_file("devices").read_text())
    everything = ["host-cpu", "jetson-thor", "x86-vnni"]
    for arguments, names in (
        (["devices", "--json"], everything),
        (["devices", "host-cpu", "--json"], ["host-cpu"]),
    ):
        code, out, err = printed(capsys, *arguments)
        assert (code, err) == (0, "")
        document = json.loads(out)
        jsonschema.validate(document, schema)
        assert [device["name"] for device in document["devices"]] == names


def test_devices_shows_facts_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = printed(capsys, "devices", "host-cpu")
    assert "memory.bandwidth_effective  37 GB/s (reading)" in out
    assert "memory-sum  torch sum over 1 GiB, 2 threads, on that machine" in out


def test_progress_in_a_log_has_the_time_left(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as out, Lines(out, interval_s=0.0).stage("work", 4) as advance:
        time.sleep(0.01)
        advance(3)
    first, second, last = path.read_text().splitlines()
    assert first == "work: 4 to do"
    assert second == "work: 3 of 4, about 0 s left"
    assert last.startswith("work: done in 0.")


def test_schemas_are_schemas() -> None:
    for verb in VERBS:
        schema = json.loads(schema_file(verb).read_text())
        jsonschema.Draft202012Validator.check_schema(schema)


def test_devices_schema_is_in_step() -> None:
    from edgevlm.device import json_schema_of_all

    committed = json.loads(schema_file("devices").read_text())
    assert committed == json.loads(json.dumps(json_schema_of_all())), (
        "run: python -m edgevlm.schemas"
    )
