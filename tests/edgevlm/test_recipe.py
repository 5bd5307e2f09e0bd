"""Reading recipes: what they give, and the whole text of every complaint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgevlm.document import MAX_BYTES
from edgevlm.errors import RecipeError
from edgevlm.passes import FoldNorms
from edgevlm.recipe import json_schema, load_recipe, parse_recipe
from edgevlm.resources import recipe_files

MINIMAL = "model: owner/name\ndevice: host-cpu\n"
IN_QUOTES = "\n  hint: put it in quotes"
A_MAPPING = "\n  hint: write one 'key: value' on a line"


def complaint(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_model_and_device_are_enough() -> None:
    recipe = parse_recipe(MINIMAL)
    assert (recipe.model, recipe.device, recipe.name) == ("owner/name", "host-cpu", "recipe")
    assert recipe.targets is None
    assert recipe.dtype is None
    assert recipe.passes == ()
    assert recipe.source == "owner/name"


def test_everything_is_read() -> None:
    recipe = parse_recipe(
        MINIMAL + "targets: [static, ort]\n"
        "dtype: float32\n"
        "passes:\n  - fold_norms: {}\n  - fold_norms:\n"
        "image: {grids: [[4, 6], [8, 8]]}\n"
        "context: {capacity: 1_024}\n"
        "generation: {temperature: 0.5, top_k: 0x10, top_p: 9e-1, max_new_tokens: 7}\n"
        "evidence: {samples: 3, data: photos, gates: {kl: 1e-5}}\n"
        "seed: 3\n"
    )
    assert recipe.targets == ("static", "ort")
    assert recipe.passes == (FoldNorms(), FoldNorms())
    assert recipe.image.grids == ((4, 6), (8, 8))
    assert recipe.context.capacity == 1024
    generation = recipe.generation
    assert (generation.temperature, generation.top_k, generation.top_p) == (0.5, 16, 0.9)
    assert recipe.evidence.gates.kl == 1e-5
    assert recipe.evidence.data == "photos"
    assert recipe.evidence.loosened == {}
    assert recipe.seed == 3


def test_yaml_is_1_2() -> None:
    """What YAML 1.1 reads as booleans and sexagesimal numbers is text."""
    assert parse_recipe("model: no/on\ndevice: 12:30:00\n").device == "12:30:00"


def test_dump_reads_back() -> None:
    recipe = parse_recipe(MINIMAL + "passes: [fold_norms: {}]\nimage: {grids: [[4, 6]]}\n")
    again = parse_recipe(json.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    assert again.model_dump() == recipe.model_dump()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "modle: a/b\ndevice: host-cpu\n",
            "recipe.yaml:1:1: unknown key 'modle'\n  hint: did you mean 'model'?",
        ),
        ("device: host-cpu\n", "recipe.yaml:1:1: missing key 'model'\n  hint: add 'model: ...'"),
        (
            MINIMAL + "image:\n  splt: true\n",
            "recipe.yaml:4:3: unknown key 'splt'\n  hint: did you mean 'split'?",
        ),
        (
            "model: 3\ndevice: host-cpu\n",
            "recipe.yaml:1:8: model must be a string, got 3",
        ),
        (
            MINIMAL + "seed: '3'\n",
            "recipe.yaml:3:7: seed must be a whole number, got '3'",
        ),
        (
            MINIMAL + "seed: 1.5\n",
            "recipe.yaml:3:7: seed must be a whole number, got 1.5",
        ),
        (
            MINIMAL + "image: {split: 1}\n",
            "recipe.yaml:3:16: image.split must be true or false, got 1",
        ),
        (MINIMAL + "image: [4]\n", "recipe.yaml:3:8: image must be a mapping, got a list"),
        (
            MINIMAL + "targets: ort\n",
            "recipe.yaml:3:10: targets must be a list, got 'ort'",
        ),
        (
            MINIMAL + "targets: []\n",
            "recipe.yaml:3:10: targets must have a length of at least 1, got 0",
        ),
        (
            MINIMAL + "image: {grids: [[4, a]]}\n",
            "recipe.yaml:3:21: image.grids.0.1 must be a whole number, got 'a'",
        ),
        (
            MINIMAL + "image: {grids: [[4]]}\n",
            "recipe.yaml:3:17: image.grids.0 has no item 2",
        ),
        (
            MINIMAL + "image: {grids: [[4, 0]]}\n",
            "recipe.yaml:3:21: image.grids.0.1 must be at least 1, got 0",
        ),
        (
            MINIMAL + "context: {capacity: -1}\n",
            "recipe.yaml:3:21: context.capacity must be at least 16, got -1",
        ),
        (
            MINIMAL + "generation: {top_p: .inf}\n",
            "recipe.yaml:3:21: generation.top_p must be a finite number, got inf",
        ),
        (
            MINIMAL + "dtype: float61\n",
            "recipe.yaml:3:8: dtype must be one of 'float32', 'float16', 'bfloat16', "
            "got 'float61'\n  hint: did you mean 'float16'?",
        ),
        (
            MINIMAL + "passes:\n  - fold_norm: {}\n",
            "recipe.yaml:4:5: unknown pass 'fold_norm'\n  hint: did you mean 'fold_norms'?",
        ),
        (
            MINIMAL + "passes:\n  - fold_norms\n",
            "recipe.yaml:4:5: a pass must be a mapping with one key, got 'fold_norms'\n"
            "  hint: write '- fold_norms: {}'",
        ),
        (
            MINIMAL + "passes:\n  - fold_norms: {eps: 1}\n",
            "recipe.yaml:4:18: unknown key 'eps'",
        ),
        (
            MINIMAL + "evidence: {gates: {kl: 0.5}}\n",
            "recipe.yaml:3:12: gates are loosened without a reason: kl from 0.0001 to 0.5\n"
            "  hint: say why in evidence.reason, which the manifest repeats",
        ),
        (
            MINIMAL + "device: host-cpu\n",
            "recipe.yaml:3:1: duplicate key 'device', first at line 2\n  hint: keep one of them",
        ),
        (
            "model: &m a/b\ndevice: *m\n",
            "recipe.yaml:1:8: anchors and aliases are not read\n  hint: write the value out",
        ),
        (
            MINIMAL + "<<: {seed: 1}\n",
            "recipe.yaml:3:1: unknown key '<<'\n  hint: choose from 'model', 'revision', 'device', "
            "'targets', 'dtype', 'passes', 'calibration', 'image', 'context', 'generation', "
            "'evidence', 'seed'",
        ),
        (
            MINIMAL + "seed: !!python/name:os.system 1\n",
            "recipe.yaml:3:7: tag '!!python/name:os.system' is not read\n  hint: remove the tag",
        ),
        (MINIMAL + "1: 2\n", "recipe.yaml:3:1: a key must be a string, got 1" + IN_QUOTES),
        (MINIMAL + "[1]: 2\n", "recipe.yaml:3:1: a key must be a string, got a list" + IN_QUOTES),
        ("", "recipe.yaml:1:1: the file must be a mapping, got nothing" + A_MAPPING),
        ("- model\n", "recipe.yaml:1:1: the file must be a mapping, got a list" + A_MAPPING),
        (MINIMAL + "---\na: 1\n", "recipe.yaml:3:1: a second document in one file"),
        (
            MINIMAL + "\tseed: 1\n",
            "recipe.yaml:3:1: not YAML: found character '\\t' that cannot start any token",
        ),
        (
            MINIMAL + "seed: [1\n",
            "recipe.yaml:4:1: not YAML: expected ',' or ']', but got '<stream end>'",
        ),
        (
            "model: a\x07b\n",
            "recipe.yaml: not YAML: unacceptable character #x0007: special characters are not "
            "allowed",
        ),
        (
            MINIMAL + "seed: " + "[" * 100_000,
            "recipe.yaml:3:38: nested deeper than 32 levels",
        ),
        (
            MINIMAL + "targets: [" + "a, " * 30_000 + "a]\n",
            "recipe.yaml:3:60002: more than 20,000 entries",
        ),
        (
            "model: owner/name/part\ndevice: host-cpu\n",
            "recipe.yaml:1:8: no checkpoint folder 'owner/name/part'\n"
            "  hint: give a folder relative to the recipe, or a Hugging Face id such as "
            "'HuggingFaceTB/SmolVLM-256M-Instruct'",
        ),
    ],
)
def test_complaints(text: str, expected: str) -> None:
    assert complaint(text) == expected


def test_alias_bomb_costs_nothing() -> None:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert complaint("\n".join(lines)) == (
        "recipe.yaml:1:4: anchors and aliases are not read\n  hint: write the value out"
    )


def test_loosened_gate_keeps_its_reason() -> None:
    recipe = parse_recipe(
        MINIMAL + "evidence: {gates: {kl: 0.5, cosine: 0.99999}, reason: int4 weights}\n"
    )
    assert recipe.evidence.loosened == {"kl": "int4 weights"}


def test_error_of_something_found_later() -> None:
    recipe = parse_recipe(MINIMAL + "context:\n  capacity: 4096\n")
    error = recipe.error("too long", "context", "capacity", hint="lower it")
    assert str(error) == "recipe.yaml:4:13: too long\n  hint: lower it"
    # A key that is not written has the place of what is around it.
    assert str(recipe.error("absent", "context", "nothing")) == "recipe.yaml:4:3: absent"


def test_folder_is_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "models" / "scenes-vlm").mkdir(parents=True)
    path = tmp_path / "a.yaml"
    path.write_text("model: models/scenes-vlm\ndevice: host-cpu\n")
    assert load_recipe(path).source == str(tmp_path / "models" / "scenes-vlm")

    path.write_text("model: models/scene-vlm\ndevice: host-cpu\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"{path}:1:8: no checkpoint folder '{tmp_path}/models/scene-vlm'\n"
        "  hint: did you mean 'models/scenes-vlm'?"
    )

    path.write_text("model: models/scenes-vlm\nrevision: abc\ndevice: host-cpu\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"{path}:2:11: revision is for a Hugging Face id, and model is a folder\n"
        "  hint: remove revision"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    there = tmp_path / "quickstart.yaml"
    there.write_text(MINIMAL)
    absent = tmp_path / "quickstrat.yaml"
    with pytest.raises(RecipeError) as caught:
        load_recipe(absent)
    assert str(caught.value) == (
        f"{absent}: no such file or directory\n  hint: did you mean 'quickstart.yaml'?"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path)
    assert str(caught.value) == f"{tmp_path}: is a directory\n  hint: name a YAML file in it"
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "zebra.yaml")
    assert str(caught.value) == (
        f"{tmp_path / 'zebra.yaml'}: no such file or directory\n"
        "  hint: choose from 'quickstart.yaml'"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RecipeError) as caught:
        load_recipe(empty / "a.yaml")
    assert str(caught.value) == (
        f"{empty / 'a.yaml'}: no such file or directory\n  hint: name a YAML file"
    )
    there.write_bytes(b"model: \xff\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(there)
    assert str(caught.value) == f"{there}: byte 7 is not UTF-8\n  hint: save the file as UTF-8"
    there.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError) as caught:
        load_recipe(there)
    assert str(caught.value) == (
        f"{there}: the file has 1,048,577 bytes, at most 1,048,576 are read\n"
        "  hint: name a YAML file that a person wrote"
    )


def test_committed_schema_is_in_step(root: Path) -> None:
    committed = json.loads((root / "recipes" / "recipe.schema.json").read_text())
    assert committed == json_schema(), "run: python -m edgevlm.schemas"


def test_recipes_are_valid_and_name_their_schema() -> None:
    import jsonschema
    from ruamel.yaml import YAML

    files = recipe_files()
    assert {"quickstart", "smolvlm-500m-shape", "qwen2_5-vl-tiny"} <= set(files)
    for path in files.values():
        first = path.read_text().splitlines()[0]
        assert first == "# yaml-language-server: $schema=recipe.schema.json"
        jsonschema.validate(YAML(typ="safe", pure=True).load(path), json_schema())
        load_recipe(path)


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys; from edgevlm.recipe import load_recipe; from edgevlm.device import "
        "list_devices; from edgevlm.resources import recipe_files\n"
        "for path in recipe_files().values(): load_recipe(path)\n"
        "list_devices()\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'onnx_ir'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
