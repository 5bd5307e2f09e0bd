"""`edgevlm plan`: visual tokens and what a prompt costs, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from edgevlm.cli import run
from edgevlm.commands.output import counted
from edgevlm.resources import schema_file


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["plan", *arguments]) == 0
    return capsys.readouterr().out


def block(text: str) -> list[str]:
    """The lines about visual tokens."""
    lines = [line.rstrip() for line in text.splitlines()]
    begin = lines.index("visual tokens")
    return lines[begin : lines.index("", begin)]


def test_tokens_of_a_schedule(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(root / "recipes" / "published" / "duet.yaml")
    assert block(shown(capsys, path)) == [
        "visual tokens",
        "layers  tokens per picture  rows of the prompt  positions  state    slots",
        "0-15    307                 406                 packed     main     1024",
        "16-23   153                 252                 packed     from_16  870",
        "24-31   0                   99                  packed     from_24  717",
        "prompt    one picture and 99 rows of text",
        "average   191.8 visual tokens a layer (33.3 % of 576)",
        "compute   vision 183 G (100.0 %), projector 6.44 G (53.3 %), prefill 1.91 T multiply-adds "
        "(42.5 % of dense)",
        "choosing  21.1 G multiply-adds; all together 2.12 T (45.2 % of dense)",
        "cache     290.8 MiB, 76.2 M keys and values of the prompt (43.1 % of dense)",
    ]


def test_without_reduction_there_are_no_shares(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(root / "recipes" / "published" / "dense.yaml")
    assert block(shown(capsys, path, "--text-rows", "24")) == [
        "visual tokens",
        "layers  tokens per picture  rows of the prompt  positions  state  slots",
        "0-31    576                 600                 kept       main   1024",
        "prompt    one picture and 24 rows of text",
        "average   576.0 visual tokens a layer",
        "compute   vision 183 G, projector 12.1 G, prefill 3.98 T multiply-adds",
        "cache     600.0 MiB, 157 M keys and values of the prompt",
    ]


def test_tiles_and_grids_are_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = root / "recipes"
    (tmp_path / "models").symlink_to(recipes / "models")
    tiled = tmp_path / "tiled.yaml"
    tiled.write_text(
        "model: models/smolvlm-500m-shape\ndevice: host-cpu\ntargets: [ort]\n"
        "context: {capacity: 2048}\n"
    )
    lines = block(shown(capsys, str(tiled)))
    assert lines[1].startswith("layers  tokens per tile ")
    # 17 tiles of 64 tokens and 2 marks each, 4 ends of rows, 2 around all, and the text.
    assert lines[2].split() == ["0-31", "64", str(17 * 66 + 6 + 64), "kept", "main", "2048"]
    assert lines[3] == "prompt    one picture of 17 tiles and 64 rows of text"
    cost = json.loads(shown(capsys, str(tiled), "--json"))["tokens"]["cost"]
    assert (cost["pictures"], cost["marks"]) == (17, 17 * 2 + 6)
    native = block(shown(capsys, str(recipes / "qwen2_5-vl-tiny.yaml")))
    assert native[3] == "prompt    one picture of 16 x 16 patches and 64 rows of text"


def test_document(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(root / "recipes" / "published" / "fastv-k2-r75.yaml")
    document = json.loads(shown(capsys, path, "--json"))
    jsonschema.validate(document, json.loads(schema_file("plan").read_text()))
    tokens = document["tokens"]
    assert tokens["layers"] == [576] * 2 + [144] * 30
    assert (tokens["average"], tokens["dense"]) == (171.0, 576)
    assert tokens["segments"][1] == {
        "first": 2,
        "end": 32,
        "tokens": 144,
        "kept": 144,
        "rows": 243,
        "positions": "kept",
        "group": "from_2",
        "capacity": 592,
    }
    cost = tokens["cost"]
    assert (cost["grid"], cost["pictures"]) == ([24, 24], 1)
    assert (cost["text_rows"], cost["marks"]) == (99, 0)
    reduced, dense = cost["reduced"], cost["dense"]
    assert cost["percent"]["prefill"] == 100 * reduced["prefill"] / dense["prefill"]
    assert cost["percent"]["average_tokens"] == 100 * 171 / 576
    assert reduced["kv_bytes"] == 4 * reduced["kv_numbers"] == 4 * 8192 * (2 * 675 + 30 * 243)
    assert (reduced["choosing"] > 0, dense["choosing"]) == (True, 0)
    parts = ("vision", "projector", "prefill", "choosing")
    assert reduced["total"] == sum(reduced[part] for part in parts)


def test_document_without_reduction(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(shown(capsys, str(root / "recipes" / "quickstart.yaml"), "--json"))
    jsonschema.validate(document, json.loads(schema_file("plan").read_text()))
    cost = document["tokens"]["cost"]
    assert cost["percent"] is None
    assert cost["reduced"] == cost["dense"]


def test_rows_of_text_are_checked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(root / "recipes" / "quickstart.yaml")
    assert run(["plan", path, "--text-rows", "-1"]) == 2
    # What it says of the range is typer's, by version.
    error = capsys.readouterr().err
    assert error.startswith("error: invalid value for '--text-rows': ")
    assert error.endswith("\n  hint: see 'edgevlm plan --help'\n")


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (9_994, "9.99 k"),
        (9_995, "10.0 k"),
        (99_949, "99.9 k"),
        (99_950, "100 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (191_000_000_000, "191 G"),
        (2_664_000_000_000, "2.66 T"),
        (12_345_000_000_000_000, "12,345 T"),
    ],
)
def test_counted(count: int, expected: str) -> None:
    assert counted(count) == expected
