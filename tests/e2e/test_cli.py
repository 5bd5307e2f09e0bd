"""The verbs over a real bundle: what they print, as text and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from edgevlm.cache import StageCache
from edgevlm.cli import run
from edgevlm.recipe import load_recipe
from edgevlm.resources import schema_file
from edgevlm.scenes import SPLITS, draw_scene, make_scene
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.session import Session

QUESTION = "What colour is the star?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    draw_scene(make_scene(SPLITS["evaluation"].start)).save(path)
    return path


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions of a user's own."""
    folder = tmp_path_factory.mktemp("samples")
    lines = []
    for number in range(3):
        draw_scene(make_scene(SPLITS["evaluation"].start + number)).save(folder / f"{number}.png")
        entry = {"image": f"{number}.png", "question": QUESTION, "answer": "red", "task": "colour"}
        lines.append(json.dumps(entry))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def document(verb: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The one JSON document that a verb prints, valid by its schema."""
    code = run([verb, *arguments, "--json"])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    value: dict[str, Any] = json.loads(captured.out)
    jsonschema.validate(value, json.loads(schema_file(verb).read_text()))
    return value


def test_plan_needs_no_weights(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny").mkdir()
    for path in (workshop / "tiny").iterdir():
        # A shard of no weights: opening names it, planning never reads it.
        if path.suffix == ".safetensors":
            (tmp_path / "tiny" / path.name).write_bytes(b"")
        else:
            shutil.copy(path, tmp_path / "tiny" / path.name)
    shutil.copy(workshop / "recipe.yaml", tmp_path / "recipe.yaml")
    plan = document("plan", capsys, str(tmp_path / "recipe.yaml"))
    assert plan["family"] == "llava"
    assert [variant["target"] for variant in plan["variants"]] == ["ort", "static"]
    assert plan["tokens"]["per_call"] == [{"grid": [12, 12], "tokens": 144}]
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert plan["tokens"]["capacity"] == recipe.context.capacity

    assert run(["plan", str(tmp_path / "recipe.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "144 tokens for 12 x 12 patches; one picture is at most 144 rows" in shown
    assert "pass fold_norms" in shown


def test_plan_shows_a_refusal_and_exits_with_3(
    workshop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workshop / "half.yaml"
    path.write_text("model: tiny\ndevice: host-cpu\ntargets: [ort]\ndtype: float16\n")
    assert run(["plan", str(path), "--json"]) == 3
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert [item["asked"] for item in plan["decisions"] if item["outcome"] == "refused"] == [
        "dtype 'float16'"
    ]
    assert captured.err == (
        "error: dtype 'float16' is refused: host-cpu computes in float32 on target 'ort'\n"
        "  hint: set dtype to float32, or leave it out\n"
    )


def test_planned_bytes_are_those_of_the_bundle(
    workshop: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan's weights and state, against the files and the manifest that came of it."""
    plan = document("plan", capsys, str(workshop / "recipe.yaml"))
    inspected = document("inspect", capsys, str(bundle))
    for planned in plan["variants"]:
        made = inspected["variants"][planned["target"]]
        assert planned["memory_bytes"]["state"] == made["state"][0]["bytes"]
        assert [graph["name"] for graph in planned["graphs"]] == [
            graph["name"] for graph in made["graphs"] if graph["role"] != "embedding"
        ]


def test_run_gives_the_session_s_answer(
    bundle: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(bundle), QUESTION, "--image", str(picture), "--max-new-tokens", "8")
    expected = Session(Bundle.open(bundle)).generate(
        QUESTION, [Image.open(picture)], max_new_tokens=8
    )
    answers = {}
    for variant in ("ort", "static"):
        answer = document("run", capsys, *arguments, "--variant", variant)
        answers[variant] = (answer["text"], tuple(answer["tokens"]))
        assert len(answer["timings"]["token_ms"]) == len(answer["tokens"]) - 1
    assert answers == dict.fromkeys(answers, (expected.text, expected.tokens))

    assert run(["run", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected.text + "\n"
    assert captured.err.startswith(f"{len(expected.tokens)} tokens; first after ")


def test_run_refuses_what_it_cannot_read(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    assert run(["run", str(bundle), QUESTION, "-i", str(broken)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert run(["run", str(bundle), QUESTION, "--variant", "npu"]) == 5
    assert capsys.readouterr().err == (
        "error: bundle 'recipe' has no variant 'npu'\n  hint: it has 'ort', 'static'\n"
    )


def test_eval_scores_and_compares(
    workshop: Path, bundle: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(bundle), "--data", str(samples), "--limit", "3")
    arguments += ("--max-new-tokens", "12")
    alone = document("eval", capsys, *arguments)
    assert alone["questions"] == 3
    assert alone["reference"] is None
    assert alone["token_agreement"] is None
    assert alone["tasks"]["colour"]["n"] == 3

    checkpoint = ("--against", "hf", "--checkpoint", str(workshop / "tiny"))
    compared = document("eval", capsys, *arguments, *checkpoint)
    assert compared["token_agreement"] == 1.0
    assert compared["reference"]["tasks"] == compared["tasks"] == alone["tasks"]

    assert run(["eval", *arguments, *checkpoint]) == 0
    shown, progress = capsys.readouterr()
    # The referee's answers are kept from before.
    assert progress.startswith("questions: 3 to do\nquestions: done in ")
    assert "3 questions to variant ort" in shown
    assert "token for token those of the Hugging Face model: 100.00% (0 differ)" in shown


def test_eval_of_descriptions_alone_has_no_mean(
    bundle: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(samples / "0.png", tmp_path / "0.png")
    entry = {"image": "0.png", "question": "?", "answer": "a red star", "task": "describe"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(entry))
    arguments = (str(bundle), "--data", str(tmp_path), "--max-new-tokens", "4")
    assert document("eval", capsys, *arguments)["mean_accuracy"] is None
    assert run(["eval", *arguments, "--quiet"]) == 0
    assert "mean of" not in capsys.readouterr().out


def test_eval_names_the_question_that_does_not_fit(
    bundle: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(samples / "0.png", tmp_path / "0.png")
    questions = (QUESTION, "star " * 600)
    entries = [{"image": "0.png", "question": text, "answer": "red"} for text in questions]
    (tmp_path / "samples.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    assert run(["eval", str(bundle), "--data", str(tmp_path), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: question 2 of 2: prompt of 747 tokens is 235 too long: 0 of the 512 tokens of the "
        "context are used\n"
        "  hint: shorten it by 235 tokens, or compile with a larger context\n"
    )


def test_eval_refuses_another_checkpoint(
    workshop: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    assert run(["eval", str(bundle), "--against", "hf", "--checkpoint", str(missing)]) == 2
    assert capsys.readouterr().err == (
        f"error: there is no folder {str(missing)!r}\n  hint: name the checkpoint's folder\n"
    )
    (tmp_path / "config.json").write_text("{}")
    other = ("--against", "hf", "--checkpoint", str(tmp_path))
    assert run(["eval", str(bundle), *other]) == 2
    assert capsys.readouterr().err == (
        f"error: config.json in '{tmp_path}' is not the one in the bundle\n"
        "  hint: name the checkpoint that the bundle was compiled from with --checkpoint\n"
    )


def test_inspect_shows_the_ladder(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspected = document("inspect", capsys, str(bundle))
    assert [rung["name"] for rung in inspected["evidence"]["rungs"]] == [
        "hf",
        "ours",
        "ort",
        "ort/runtime",
        "static",
        "static/runtime",
    ]
    assert [change["pass"] for change in inspected["changes"]] == ["fold_norms"]
    assert run(["inspect", str(bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    ladder = lines[lines.index(next(line for line in lines if line.startswith("rung "))) :]
    assert [line.split()[0] for line in ladder[1:7]] == [
        "hf",
        "ours",
        "ort",
        "ort/runtime",
        "static",
        "static/runtime",
    ]
    # Every gate holds, or there would be no bundle; the width fits a terminal of 80 columns.
    assert all(
        held == total for held, total in (line.split()[-1].split("/") for line in ladder[2:7])
    )
    assert max(len(line.rstrip()) for line in ladder) <= 80


def test_inspect_refuses_an_altered_bundle(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert run(["inspect", str(copy)]) == 5
    assert "tokenizer.json" in capsys.readouterr().err


def test_an_altered_weight_is_refused_before_any_figure(
    bundle: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    weights = bytearray((copy / "weights.bin").read_bytes())
    weights[-10] ^= 1
    (copy / "weights.bin").write_bytes(weights)
    for arguments in (
        ["eval", str(copy), "--data", str(samples), "--limit", "1"],
        ["run", str(copy), QUESTION],
        ["inspect", str(copy)],
    ):
        assert run(arguments) == 5
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: file 'weights.bin' was altered: sha256 ")
        assert captured.err.endswith("\n  hint: copy or compile the bundle again\n")


def test_provenance_of_another_shape_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for provenance in ({"changes": 3}, {"decisions": [{"a": 1}]}, {"evidence": {"samples": {}}}):
        (copy / "manifest.json").write_text(json.dumps({**manifest, "provenance": provenance}))
        assert run(["inspect", str(copy)]) == 5
        assert capsys.readouterr().err == (
            "error: provenance in manifest.json is not as a compile writes it\n"
            "  hint: compile the bundle again, a manifest is not edited by hand\n"
        )


def test_broken_weights_are_refused_before_the_reference_reads_them(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workshop / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"")
    shutil.copy(workshop / "recipe.yaml", tmp_path / "recipe.yaml")
    out = tmp_path / "bundle"
    assert run(["compile", str(tmp_path / "recipe.yaml"), "--out", str(out), "--quiet"]) == 2
    assert capsys.readouterr().err == (
        "error: model.safetensors is not a whole safetensors file: "
        "Error while deserializing header: header too small\n"
        "  hint: download the checkpoint again, all of it\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "tiny"]


def test_samples_that_do_not_fit_the_context_are_refused_at_once(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workshop / "narrow.yaml"
    path.write_text("model: tiny\ndevice: host-cpu\ncontext: {capacity: 256}\n")
    assert run(["compile", str(path), "--out", str(tmp_path / "bundle"), "--quiet"]) == 2
    assert capsys.readouterr().err == (
        f"error: {path}:3:21: the evidence's longest sample takes 334 rows (302 of prompt, 32 of "
        "answer), the context has 256\n"
        "  hint: set context.capacity to at least 334, or choose other samples with evidence.data\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_compile_prints_one_document(
    workshop: Path,
    cache: StageCache,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("edgevlm.compile.default_root", lambda: cache.root)
    out = tmp_path / "again"
    made = document("compile", capsys, str(workshop / "recipe.yaml"), "--out", str(out))
    assert made["bundle"] == str(out)
    assert made["files"] == document("inspect", capsys, str(bundle))["files"]
    assert made["seconds"] > 0
