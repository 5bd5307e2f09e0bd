"""JSON to frozen dataclasses and back, strictly: unknown key, missing key, wrong type are errors.

The annotations of the dataclasses are the whole definition. An error names the place
(`manifest.json: variants.ort.graphs[2].rows`), the value found there, and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from edgevlm_runtime.errors import BundleError

T = TypeVar("T")

_RECOMPILE = "compile the bundle again, a manifest is not edited by hand"
_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def from_json(kind: type[T], data: Any, place: str = "manifest.json") -> T:
    """Build a dataclass from parsed JSON; `place` says in errors where the JSON came from."""
    value: T = _parse(kind, data, place)
    return value


def to_json(value: Any) -> Any:
    """Plain data that `from_json` reads back to an equal value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def read_json(text: bytes | str, place: str = "manifest.json") -> Any:
    """Parse JSON; a key given twice and a number that is not finite are errors too."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, item in items:
            if key in seen:
                raise BundleError(
                    f"{place}: key {key!r} stands twice in one object", hint=_RECOMPILE
                )
            seen[key] = item
        return seen

    def constant(name: str) -> Any:
        raise BundleError(f"{place}: {name} is not a JSON number", hint=_RECOMPILE)

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{place} is not JSON: {error}", hint=_RECOMPILE) from None


def _parse(kind: Any, data: Any, path: str) -> Any:
    """Check one value against one annotation; `path` is `FILE`, then `FILE: key.key[0]`."""
    if kind is Any:
        return data
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(kind, data, path)
    if origin is tuple:
        return _parse_tuple(typing.get_args(kind), data, path)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise _wrong(path, "an object", data)
        item_kind = typing.get_args(kind)[1]
        return {key: _parse(item_kind, item, _join(path, key)) for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, data, path)
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is not kind:
        raise _wrong(path, _NAMES.get(kind, str(kind)), data)
    return data


def _parse_dataclass(kind: Any, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise _wrong(path, "an object", data)
    hints = _hints(kind)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise BundleError(
                f"{path}: unknown key {key!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(hints)}",
            )
    for field in dataclasses.fields(kind):
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and field.name not in data:
            raise BundleError(f"{path}: missing key {field.name!r}", hint=_RECOMPILE)
    return kind(**{key: _parse(hints[key], item, _join(path, key)) for key, item in data.items()})


def _parse_tuple(kinds: tuple[Any, ...], data: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise _wrong(path, "a list", data)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(data)
    if len(data) != len(kinds):
        raise _wrong(path, f"a list of {len(kinds)}", data)
    return tuple(
        _parse(kind, item, f"{path}[{index}]")
        for index, (kind, item) in enumerate(zip(kinds, data, strict=True))
    )


def _parse_union(kind: Any, data: Any, path: str) -> Any:
    """None, or the one member whose JSON type fits: no two members may share a JSON type."""
    members = typing.get_args(kind)
    if data is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1:
        return _parse(members[0], data, path)
    for member in members:
        if type(data) is member:
            return data
    raise _wrong(path, " or ".join(_NAMES.get(member, str(member)) for member in members), data)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Annotations of the fields, class variables left out."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if ": " in path else f"{path}: {key}"


def _wrong(path: str, expected: str, data: Any) -> BundleError:
    shown = json.dumps(data)
    if len(shown) > 60:
        shown = f"{shown[:57]}..."
    return BundleError(f"{path}: expected {expected}, got {shown}", hint=_RECOMPILE)
