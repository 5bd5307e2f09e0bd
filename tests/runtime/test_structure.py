"""JSON to dataclasses: equal both ways, and every error names the place, the value, the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgevlm_runtime import structure
from edgevlm_runtime.bundle import parse_manifest
from edgevlm_runtime.errors import BundleError
from edgevlm_runtime.schema import schema_text
from tests.runtime.bundles import write_toy

REMEDY = "\n  hint: compile the bundle again, a manifest is not edited by hand"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return (write_toy(tmp_path_factory.mktemp("toy") / "b") / "manifest.json").read_text()


def test_writing_and_reading_are_inverse(text: str) -> None:
    manifest = parse_manifest(text)
    assert structure.to_json(manifest) == json.loads(text)
    assert parse_manifest(json.dumps(structure.to_json(manifest))) == manifest
    assert manifest.variants["static"].graphs[3].rows == 4
    assert manifest.variants["static"].state[0].tensors[0].shape == (1, 1, 64, 16)


def at(*keys: str | int) -> Callable[[Any, Any], None]:
    """Put a value at a place."""

    def put(data: Any, value: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return put


GRAPH = ("variants", "ort", "graphs", 2)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (at("name"), 3, "manifest.json: name: expected a string, got 3"),
        (at("files"), [1], "manifest.json: files: expected an object, got [1]"),
        (
            at("files", "step.onnx", "size"),
            "9",
            'manifest.json: files.step.onnx.size: expected an integer, got "9"',
        ),
        (
            at("files", "step.onnx", "size"),
            True,
            "manifest.json: files.step.onnx.size: expected an integer, got true",
        ),
        (
            at(*GRAPH, "phases"),
            "decode",
            'manifest.json: variants.ort.graphs[2].phases: expected a list, got "decode"',
        ),
        (
            at(*GRAPH, "rows"),
            1.5,
            "manifest.json: variants.ort.graphs[2].rows: expected an integer, got 1.5",
        ),
        (
            at(*GRAPH, "grid"),
            [1, 2, 3],
            "manifest.json: variants.ort.graphs[2].grid: expected a list of 2, got [1, 2, 3]",
        ),
        (
            at(*GRAPH, "inputs", 0, "shape", 1),
            None,
            "manifest.json: variants.ort.graphs[2].inputs[0].shape[1]: expected an integer or "
            "a string, got null",
        ),
        (
            at("variants", "ort", "rope", "inv_freq", 0),
            "x" * 80,
            "manifest.json: variants.ort.rope.inv_freq[0]: expected a number, got "
            '"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...',
        ),
    ],
)
def test_wrong_types(
    text: str, place: Callable[[Any, Any], None], value: Any, message: str
) -> None:
    data = json.loads(text)
    place(data, value)
    with pytest.raises(BundleError) as error:
        parse_manifest(json.dumps(data))
    assert str(error.value) == message + REMEDY


def test_unknown_and_missing_keys(text: str) -> None:
    data = json.loads(text)
    data["variants"]["ort"]["graphs"][2]["weigths"] = []
    with pytest.raises(BundleError) as error:
        parse_manifest(json.dumps(data))
    assert str(error.value) == (
        "manifest.json: variants.ort.graphs[2]: unknown key 'weigths'\n"
        "  hint: did you mean 'weights'?"
    )
    data = json.loads(text)
    data["files"]["step.onnx"]["mode"] = 1
    with pytest.raises(BundleError) as error:
        parse_manifest(json.dumps(data))
    assert str(error.value) == (
        "manifest.json: files.step.onnx: unknown key 'mode'\n  hint: known keys: size, sha256"
    )
    data = json.loads(text)
    del data["generation"]
    with pytest.raises(BundleError) as error:
        parse_manifest(json.dumps(data))
    assert str(error.value) == "manifest.json: missing key 'generation'" + REMEDY


def test_text_that_is_not_json(text: str) -> None:
    cases = {
        '{"a": 1, "a": 2}': "manifest.json: key 'a' stands twice in one object",
        '{"a": NaN}': "manifest.json: NaN is not a JSON number",
        "{": "manifest.json is not JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
        "[]": "manifest.json: expected an object, got []",
    }
    for broken, message in cases.items():
        with pytest.raises(BundleError) as error:
            parse_manifest(broken)
        assert str(error.value) == message + REMEDY
    for broken in (b"\xff\xfe\x00", b"[" * 200_000):
        with pytest.raises(BundleError, match=r"^manifest\.json is not JSON: "):
            parse_manifest(broken)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            at("default_variant"),
            "gpu",
            "default_variant: 'gpu' is not one of the variants ('ort', 'static')",
        ),
        (
            at(*GRAPH, "file"),
            "other.onnx",
            "variants.ort.graphs[step].file: 'other.onnx' is not one of the files "
            "('embedding.npy', 'step.onnx', 'step_1.onnx', 'step_16.onnx', 'step_4.onnx', "
            "'tokenizer.json', 'vision.onnx')",
        ),
        (at(*GRAPH, "name"), "vision", "variants.ort.graphs: 'vision' stands twice"),
        (
            at(*GRAPH, "phases"),
            ["think"],
            "variants.ort.graphs[step].phases: 'think' is not one of the phases ('decode', "
            "'picture', 'prefill', 'verify')",
        ),
        (
            at(*GRAPH, "inputs", 3, "source"),
            "total:side",
            "variants.ort.graphs[step].inputs[seqlens_k].source: 'side' is not one of the groups "
            "('main')",
        ),
        (
            at(*GRAPH, "inputs", 3, "source"),
            "total",
            "variants.ort.graphs[step].inputs[seqlens_k].source: source 'total' takes the name of "
            "a group, got 'total'",
        ),
        (
            at(*GRAPH, "inputs", 1, "source"),
            "rope_cos:late",
            "variants.ort.graphs[step].inputs[rope_cos].source: 'late' is not one of the groups "
            "('main')",
        ),
        (
            at(*GRAPH, "inputs", 0, "source"),
            "question_weights:verbs",
            "variants.ort.graphs[step].inputs[inputs_embeds].source: 'verbs' is not one of the "
            "kinds ('question', 'text', 'words')",
        ),
        (
            at(*GRAPH, "inputs", 0, "source"),
            "row_weights",
            "variants.ort.graphs[step].inputs[inputs_embeds].source: source 'row_weights' takes "
            "the name of a kind, got 'row_weights'",
        ),
        (
            at(*GRAPH, "inputs", 0, "source"),
            "row_weights:text",
            "variants.ort.graphs[step].inputs[inputs_embeds].source: 'row_weights' is only for "
            "graphs of the phase 'picture'",
        ),
        (
            at(*GRAPH, "inputs", 0, "source"),
            "picture_rows",
            "variants.ort.graphs[step].inputs[inputs_embeds].source: 'picture_rows' is only for "
            "graphs of the phase 'picture'",
        ),
        (
            at(*GRAPH, "phases"),
            ["decode", "picture"],
            "variants.ort.graphs[step].phases: 'picture' stands alone, got ['decode', 'picture']",
        ),
        (
            at(*GRAPH, "inputs", 0, "source"),
            "embeds:x",
            "variants.ort.graphs[step].inputs[inputs_embeds].source: source 'embeds' takes no "
            "name, got 'embeds:x'",
        ),
        (
            at(*GRAPH, "inputs", 0, "dtype"),
            "bfloat16",
            "variants.ort.graphs[step].inputs[inputs_embeds].dtype: 'bfloat16' is not one of the "
            "dtypes ('bool', 'float16', 'float32', 'float64', 'float8_e4m3fn', 'float8_e5m2', "
            "'int16', 'int32', 'int64', 'int8', 'uint8')",
        ),
        (at(*GRAPH, "max_rows"), 0, "variants.ort.graphs[step].rows: 0 is not positive"),
        (
            at("variants", "ort", "state", 0, "tensors", 0, "shape", 2),
            -4,
            "variants.ort.state[main].key.0.shape: -4 is not positive",
        ),
        (
            at("variants", "ort", "state", 0, "tensors", 0, "axis"),
            4,
            "variants.ort.state[main].key.0.axis: 4 is not an axis of 4",
        ),
        (
            at("variants", "ort", "rope", "sections"),
            [4, 5],
            "variants.ort.rope.sections: 9 frequencies are given of 8",
        ),
        (
            at("variants", "ort", "max_positions"),
            1 << 40,
            "variants.ort.max_positions: 1099511627776 is not from 1 to 16777216",
        ),
        (
            at(*GRAPH, "dropped"),
            {"late": 1},
            "variants.ort.graphs[step].dropped: 'late' is not one of the state groups ('main')",
        ),
    ],
)
def test_names_that_lead_nowhere(
    text: str, place: Callable[[Any, Any], None], value: Any, message: str
) -> None:
    data = json.loads(text)
    place(data, value)
    with pytest.raises(BundleError) as error:
        parse_manifest(json.dumps(data))
    assert str(error.value) == (
        f"manifest.json: {message}\n  hint: compile the bundle again, or upgrade edgevlm-runtime"
    )


def test_the_committed_schema_is_that_of_the_dataclasses(root: Path) -> None:
    """To renew it: python -m edgevlm_runtime.schema > runtime/.../manifest.schema.json."""
    path = root / "runtime" / "edgevlm_runtime" / "manifest.schema.json"
    assert path.read_text() == schema_text()
