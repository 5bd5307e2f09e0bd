"""A YAML 1.2 file a person wrote, read with the place of everything in it.

A recipe or a device file is read by `read` into plain mappings, tuples and scalars, and checked
against a pydantic model by `Document.parse`. Every complaint is a `RecipeError` that begins with
`file:line:column`. What YAML allows and nobody needs here is refused: anchors and aliases (a bomb
of 400 bytes expands to gigabytes), tags, duplicate keys, keys that are no strings, deep nesting.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.nodes import ScalarNode

from edgevlm.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ENTRIES = 20_000

Keys = tuple["str | int", ...]
Place = tuple[int, int]
OptionsT = TypeVar("OptionsT", bound="Options")

# Everything else YAML 1.2 resolves (dates, merge keys) stays the text that was written.
_SCALARS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))

_LIMITS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_LENGTHS = {"too_short": ("min_length", "of at least"), "too_long": ("max_length", "of at most")}
_EXPECTED = {
    "string_type": "a string",
    "string_too_short": "a string of at least one character",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "finite_number": "a finite number",
}


class Complaint(ValueError):  # noqa: N818 - pydantic carries ValueErrors on, with their place
    """What a validator found wrong, with the remedy, and the key where it is not the value."""

    def __init__(self, message: str, *, hint: str | None = None, key: str | None = None) -> None:
        """Hold the clause, the remedy and the key."""
        super().__init__(message)
        self.message, self.hint, self.key = message, hint, key


class Options(BaseModel):
    """A mapping of a file: keys it does not know are errors, and no value is converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    key_noun: ClassVar[str] = "key"

    @model_validator(mode="before")
    @classmethod
    def _knows_every_key(cls, data: object) -> object:
        for key in data if isinstance(data, Mapping) else ():
            if key not in cls.model_fields:
                hint = suggest(key, list(cls.model_fields))
                raise Complaint(f"unknown {cls.key_noun} {key!r}", hint=hint, key=key)
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """The data of a file, and where in it every key, value and list item begins (from 1)."""

    path: Path
    data: Mapping[str, Any]
    keys: Mapping[Keys, Place]
    values: Mapping[Keys, Place]

    def error(self, message: str, *keys: str | int, hint: str | None = None) -> RecipeError:
        """An error at the value under these keys, or at the nearest thing around it."""
        while keys not in self.values:
            keys = keys[:-1]
        return self._error(message, self.values[keys], hint)

    def parse(self, model: type[OptionsT]) -> OptionsT:
        """Check the data against the model; the first complaint in the file is the error."""
        try:
            return model.model_validate(self.data)
        except ValidationError as error:
            details = error.errors(include_url=False)
            found = [self._explain(detail) for detail in details if not _is_echo(detail)]
        raise min(found, key=lambda error: (error.line or 0, error.column or 0))

    def _error(self, message: str, place: Place, hint: str | None = None) -> RecipeError:
        return RecipeError(message, hint=hint, path=self.path, line=place[0], column=place[1])

    def _explain(self, detail: ErrorDetails) -> RecipeError:
        where = self._keys_of(detail)
        detail["loc"] = where
        complaint = detail.get("ctx", {}).get("error")
        if not isinstance(complaint, Complaint):
            message, hint = _clause(detail)
            return self.error(message, *where, hint=hint)
        if complaint.key is None:
            return self.error(complaint.message, *where, hint=complaint.hint)
        key = (*where, complaint.key)
        return self._error(complaint.message, self.keys[key], complaint.hint)

    def _keys_of(self, detail: ErrorDetails) -> Keys:
        """Where a complaint is, without the names that pydantic gives members of unions."""
        keys: Keys = ()
        for place, key in enumerate(detail["loc"], 1):
            is_missing = detail["type"] == "missing" and place == len(detail["loc"])
            if is_missing or (*keys, key) in self.values:
                keys = (*keys, key)
        return keys


def read(path: Path) -> Document:
    """Read the file, refusing what a settings file has no use for."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RecipeError(
                f"the file has {size:,} bytes, at most {MAX_BYTES:,} are read",
                path=path,
                hint="name a YAML file that a person wrote",
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"byte {error.start} is not UTF-8", path=path, hint="save the file as UTF-8"
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RecipeError(reason, path=path, hint=_elsewhere(path)) from None
    return parse_text(text, path)


def parse_text(text: str, path: Path) -> Document:
    """Read YAML text as the file at `path` would be read."""
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 2)
    try:
        builder = _Builder(path, iter(yaml.parse(text)), yaml)
        data = builder.document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(
            f"not YAML: {error.problem or error.context}",
            path=path,
            line=None if mark is None else mark.line + 1,
            column=None if mark is None else mark.column + 1,
        ) from None
    except YAMLError as error:
        raise RecipeError(f"not YAML: {str(error).splitlines()[0].strip()}", path=path) from None
    if not isinstance(data, dict):
        raise RecipeError(
            f"the file must be a mapping, got {show(data)}",
            path=path,
            line=1,
            column=1,
            hint="write one 'key: value' on a line",
        )
    return Document(path=path, data=data, keys=builder.keys, values=builder.values)


def nearest(word: str, choices: Sequence[str]) -> str | None:
    """The choice that the word is a misspelling of, as a question."""
    for near in difflib.get_close_matches(word, choices, n=1):
        return f"did you mean {near!r}?"
    return None


def suggest(word: str, choices: Sequence[str]) -> str | None:
    """The nearest choice as a question; all of them where none is near and they are few."""
    if (hint := nearest(word, choices)) is not None:
        return hint
    if 0 < len(choices) <= 12:
        return "choose from " + ", ".join(repr(choice) for choice in choices)
    return None


def show(value: object) -> str:
    """A value as it stands in an error message."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (tuple, list)):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Builder:
    """Plain data from YAML events, with the places of its keys."""

    def __init__(self, path: Path, events: Iterator[Event], yaml: YAML) -> None:
        self._path, self._events, self._yaml = path, events, yaml
        self.keys: dict[Keys, Place] = {}
        self.values: dict[Keys, Place] = {(): (1, 1)}

    def document(self) -> Any:
        value: Any = None
        seen = False
        for event in self._events:
            if isinstance(event, DocumentStartEvent):
                if seen:
                    raise self._error(event, "a second document in one file")
                seen = True
                value = self._value(next(self._events), ())
        return value

    def _value(self, event: Event, keys: Keys) -> Any:
        if isinstance(event, AliasEvent):
            raise self._error(event, "anchors and aliases are not read", hint="write the value out")
        assert isinstance(event, (ScalarEvent, SequenceStartEvent, MappingStartEvent))
        if event.anchor is not None:
            raise self._error(event, "anchors and aliases are not read", hint="write the value out")
        if event.tag is not None:
            tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")
            raise self._error(event, f"tag {tag!r} is not read", hint="remove the tag")
        if len(keys) >= MAX_DEPTH:
            raise self._error(event, f"nested deeper than {MAX_DEPTH} levels")
        if len(self.values) > MAX_ENTRIES:
            raise self._error(event, f"more than {MAX_ENTRIES:,} entries")
        self.values.setdefault(keys, _place(event))
        if isinstance(event, MappingStartEvent):
            return self._mapping(keys)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(keys)
        return self._scalar(event)

    def _mapping(self, keys: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self._events), MappingEndEvent):
            key = self._value(event, keys) if isinstance(event, ScalarEvent) else ()
            if not isinstance(key, str):
                clause = f"a key must be a string, got {show(key)}"
                raise self._error(event, clause, hint="put it in quotes")
            inner = (*keys, key)
            if key in values:
                line = self.keys[inner][0]
                clause = f"duplicate key {key!r}, first at line {line}"
                raise self._error(event, clause, hint="keep one of them")
            self.keys[inner] = _place(event)
            values[key] = self._value(next(self._events), inner)
        return values

    def _sequence(self, keys: Keys) -> tuple[Any, ...]:
        values: list[Any] = []
        while not isinstance(event := next(self._events), SequenceEndEvent):
            inner = (*keys, len(values))
            values.append(self._value(event, inner))
        return tuple(values)

    def _scalar(self, event: ScalarEvent) -> Any:
        tag = str(self._yaml.resolver.resolve(ScalarNode, event.value, event.implicit))
        if tag not in _SCALARS:
            return event.value
        return self._yaml.constructor.construct_object(ScalarNode(tag, event.value))

    def _error(self, event: Event, message: str, hint: str | None = None) -> RecipeError:
        line, column = _place(event)
        return RecipeError(message, hint=hint, path=self._path, line=line, column=column)


def _clause(detail: ErrorDetails) -> tuple[str, str | None]:
    """What pydantic found wrong, in our words, and the remedy where the clause does not say it."""
    where, kind, facts = detail["loc"], detail["type"], detail.get("ctx", {})
    name, got = ".".join(str(key) for key in where), show(detail["input"])
    if kind == "missing":
        if isinstance(where[-1], int):
            return f"{name.rpartition('.')[0]} has no item {where[-1] + 1}", None
        return f"missing key {where[-1]!r}", f"add '{where[-1]}: ...'"
    if kind == "literal_error":
        choices = facts["expected"].replace(" or ", ", ")
        hint = nearest(str(detail["input"]), [choice.strip("'") for choice in choices.split(", ")])
        return f"{name} must be one of {choices}, got {got}", hint
    if kind in _EXPECTED:
        return f"{name} must be {_EXPECTED[kind]}, got {got}", None
    if kind in _LIMITS:
        fact, words = _LIMITS[kind]
        return f"{name} must be {words} {facts[fact]}, got {got}", None
    if kind in _LENGTHS:
        fact, words = _LENGTHS[kind]
        length = facts["actual_length"]
        return f"{name} must have a length {words} {facts[fact]}, got {length}", None
    return f"{name}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {got}", None


def _is_echo(detail: ErrorDetails) -> bool:
    """Whether a list counts as too short only because its items were refused."""
    facts = detail.get("ctx", {})
    return detail["type"] == "too_short" and len(detail["input"]) >= facts["min_length"]


def _place(event: Event) -> Place:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _elsewhere(path: Path) -> str:
    """The hint for a file that cannot be read: which one could be meant."""
    if path.is_dir():
        return "name a YAML file in it"
    if path.exists():
        return "make it readable"
    if not path.parent.is_dir():
        return f"name a YAML file; there is no folder {str(path.parent)!r}"
    files = [file.name for file in sorted(path.parent.glob("[!.]*.yaml"))]
    return suggest(path.name, files) or "name a YAML file"
