"""Hostile recipes and device files: whatever the text, a recipe or a RecipeError, and soon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.device import parse_device
from edgevlm.errors import RecipeError
from edgevlm.recipe import Recipe, load_recipe, parse_recipe
from edgevlm.resources import device_files

KEYS = (*Recipe.model_fields, "split", "grids", "gates", "fold_norms", "<<", "")
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["host-cpu", "ort", "owner/name", "*a", "&a b", "!!int x", "[", "{", "- "])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
    ),
    max_leaves=8,
)


def refusal(read: Callable[[], object]) -> str | None:
    """The complaint, or None where it was read; any other error is a failure."""
    try:
        read()
    except RecipeError as error:
        return error.message
    return None


def read_or_refused(text: str) -> None:
    message = refusal(lambda: parse_recipe(text))
    # The place comes first, and the clause is one line.
    assert message is None or (message.startswith("recipe.yaml") and "\n" not in message)


def as_yaml(value: object, indent: str = "") -> str:
    """YAML in block style with scalars written bare, so that they may be anything."""
    if isinstance(value, dict) and value:
        lines = [f"{indent}{key}:{nested(item, indent)}" for key, item in value.items()]
        return "\n".join(lines)
    if isinstance(value, list) and value:
        return "\n".join(f"{indent}-{nested(item, indent)}" for item in value)
    return f"{indent}{value}"


def nested(value: object, indent: str) -> str:
    if isinstance(value, (dict, list)) and value:
        return "\n" + as_yaml(value, indent + "  ")
    return f" {value}"


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_keys_with_any_values(data: dict[str, object]) -> None:
    read_or_refused("model: owner/name\ndevice: host-cpu\n" + as_yaml(data) + "\n")
    read_or_refused(as_yaml(data) + "\n")


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet=st.sampled_from("abm:-?[]{}&*!|>'\"%@`#, \n\t0.~\\\x00\u2028é"), max_size=60)
)
def test_any_text(text: str) -> None:
    read_or_refused(text)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_device_file_with_a_line_changed(data: st.DataObject) -> None:
    path = device_files()["host-cpu"]
    lines = path.read_text().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    change = data.draw(st.sampled_from(["drop", "double", "cut", "indent"]))
    line = lines[number]
    lines[number : number + 1] = {
        "drop": [],
        "double": [line, line],
        "cut": [line[: len(line) // 2]],
        "indent": [f"  {line}"],
    }[change]
    message = refusal(lambda: parse_device("\n".join(lines) + "\n", path))
    assert message is None or message.startswith(str(path))


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 64, b"\xff\xfe\x00", b"PK\x03\x04", b"\x80\x04."]
)
def test_any_bytes(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(path)
