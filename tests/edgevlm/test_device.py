"""Device files: every number has a source, and the solver keeps to what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from edgevlm.device import Device, Fact, json_schema, load_device, parse_device
from edgevlm.errors import RecipeError
from edgevlm.resources import device_files

HOST = device_files()["host-cpu"]


def edited(old: str, new: str) -> str:
    text = HOST.read_text()
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    return text.replace(old, new)


def numbers_without_source(data: Any, path: str = "", sourced: bool = False) -> Iterator[str]:
    if isinstance(data, dict):
        sourced = sourced or {"kind", "source"} <= set(data)
        for key, value in data.items():
            yield from numbers_without_source(value, f"{path}.{key}", sourced)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from numbers_without_source(value, f"{path}.{index}", sourced)
    elif isinstance(data, (int, float)) and not isinstance(data, bool) and not sourced:
        yield path


def number_fields(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """Fields of the schema that take a bare number outside a Fact."""
    if model in seen:
        return
    seen.add(model)
    for name, field in model.model_fields.items():
        for kind in flattened(field.annotation):
            if kind in (int, float) and not issubclass(model, Fact):
                yield f"{model.__name__}.{name}"
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from number_fields(kind, seen)


def flattened(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from flattened(argument)


@pytest.mark.parametrize("name", sorted(device_files()))
def test_every_number_has_a_source(name: str) -> None:
    device = load_device(name)
    assert list(numbers_without_source(device.model_dump(mode="json"))) == []


def test_schema_has_no_place_for_an_unsourced_number() -> None:
    assert list(number_fields(Device, set())) == []


def test_host_cpu_says_what_was_measured() -> None:
    device = load_device("host-cpu")
    assert device.targets == ("ort", "static")
    assert device.memory.capacity.base == 24 * 2**30
    assert device.memory.bandwidth_effective is not None
    assert device.memory.bandwidth_effective.base == 37e9
    assert device.peak["float32"].base == 172e9
    assert {fact.kind for fact in device.peak.values()} == {"measured"}
    assert device.dtypes_of("static")[0].weight == "float32"
    limit = device.numeric.int8_weight_bits
    assert limit is not None
    assert limit.value == 7


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "  capacity: {value: 24, unit: GiB, kind: measured, source: machine}",
            "  capacity: 24",
            "17:13: memory.capacity must be a mapping, got 24",
        ),
        (
            "value: 24, unit: GiB, kind: measured, source: machine",
            "value: 24, unit: GiB, kind: measured",
            "17:13: missing key 'source'\n  hint: add 'source: ...'",
        ),
        (
            "source: machine}",
            "source: machin}",
            "17:60: no source 'machin' in sources\n  hint: did you mean 'machine'?",
        ),
        (
            "unit: GiB",
            "unit: GB",
            "17:31: unknown unit 'GB'\n  hint: did you mean 'GiB'?",
        ),
        (
            "value: 24, unit",
            "value: many, unit",
            "17:21: memory.capacity.value must be a number, got 'many'",
        ),
        (
            "kind: assumed",
            "kind: guessed",
            "116:37: numeric.mask_value.kind must be one of 'measured', 'vendor', 'fitted', "
            "'assumed', got 'guessed'",
        ),
        (
            "    targets: [ort, static]",
            "    targets: [ort, rknn]",
            "23:1: dtypes name the target 'rknn'\n  hint: choose from 'ort', 'static'",
        ),
        (
            "name: host-cpu",
            "name: host",
            "4:7: the name 'host' is not that of the file, 'host-cpu'",
        ),
    ],
)
def test_complaints(old: str, new: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_device(edited(old, new), HOST)
    assert str(caught.value).removeprefix(f"{HOST}:") == expected


def test_unknown_device() -> None:
    with pytest.raises(RecipeError) as caught:
        load_device("host-gpu")
    assert str(caught.value) == "unknown device 'host-gpu'\n  hint: did you mean 'host-cpu'?"


def test_committed_schema_is_in_step(root: Path) -> None:
    committed = json.loads((root / "devices" / "device.schema.json").read_text())
    assert committed == json_schema(), "run: python -m edgevlm.schemas"
