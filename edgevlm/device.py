"""A device: facts about the hardware and the software that runs on it, each with its source.

A device file holds no opinions: every number stands in a `Fact`, which names one of the file's
`sources` and says of what kind the number is. What the facts mean for a recipe is decided in
`edgevlm.solve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator
from pydantic.json_schema import GenerateJsonSchema

from edgevlm.document import Complaint, Document, Options, parse_text, read, suggest
from edgevlm.errors import RecipeError
from edgevlm.resources import device_files

__all__ = [
    "Device",
    "DtypeFact",
    "Fact",
    "LimitFact",
    "PointFact",
    "Quantity",
    "json_schema",
    "json_schema_of_all",
    "list_devices",
    "load_device",
    "parse_device",
]

FLOATS = ("float32", "float16", "bfloat16")
Kind = Literal["measured", "vendor", "fitted", "assumed"]


class Fact(Options):
    """Something known, how it is known, and from where (a key of `sources`)."""

    kind: Kind
    source: str = Field(min_length=1)
    note: str | None = Field(None, min_length=1)


class Quantity(Fact):
    """A number with its unit."""

    value: float
    unit: str = Field(min_length=1)

    _factors: ClassVar[Mapping[str, float]] = {
        "GiB": 2**30,
        "MiB": 2**20,
        "GB/s": 1e9,
        "GOP/s": 1e9,
        "TOP/s": 1e12,
    }

    @property
    def base(self) -> float:
        """The number in bytes, bytes per second or operations per second."""
        return self.value * self._factors[self.unit]

    @field_validator("unit")
    @classmethod
    def _is_known(cls, unit: str) -> str:
        if unit not in cls._factors:
            raise Complaint(f"unknown unit {unit!r}", hint=suggest(unit, list(cls._factors)))
        return unit


class LimitFact(Fact):
    """A whole number that a graph must keep to (an opset, a rank, a value of a closed mask)."""

    value: int


class DtypeFact(Fact):
    """A pair of types that the device computes with.

    `granularity` says what shares a scale where the weight is quantized: `tensor`, `channel`,
    `group` (of one of `group_sizes` weights); `scales` what may share one of the activations.
    """

    weight: str = Field(min_length=1)
    activation: str = Field(min_length=1)
    targets: tuple[str, ...] = Field(min_length=1)
    granularity: Literal["tensor", "channel", "group"] | None = None
    group_sizes: tuple[int, ...] = ()
    scales: tuple[Literal["token", "tensor", "block", "static"], ...] = ()


class PointFact(Fact):
    """A measured time of a published shape, to check predictions against."""

    model: str
    precision: str
    prompt_tokens: int | None = Field(None, ge=1)
    vision_ms: float | None = Field(None, gt=0)
    prefill_ms: float | None = Field(None, gt=0)
    token_ms: float | None = Field(None, gt=0)


class Stack(Options):
    """The software that was looked at."""

    name: str
    version: str


class CompileFacts(Options):
    """What a graph must be like to run there."""

    route: str = Field(description="How a graph gets from ONNX to the device.")
    static_only: bool
    opset_max: LimitFact
    max_rank: LimitFact | None = None


class MemoryFacts(Options):
    """Sizes and speeds of the memory."""

    capacity: Quantity
    bandwidth_peak: Quantity | None = None
    bandwidth_effective: Quantity | None = None
    max_single_buffer: Quantity | None = None


class NumericFacts(Options):
    """What numbers do there."""

    mask_value: LimitFact = Field(description="What closes a column of an attention mask.")
    int8_weight_bits: LimitFact | None = Field(
        None,
        description="Bits of int8 weights whose products with int8 activations are exact there.",
    )
    bfloat16: bool


class Device(Options):
    """All that is known of a device; the file's name is the device's name."""

    name: str = Field(min_length=1)
    summary: str = Field(min_length=1)
    vendor: str
    soc: str
    stack: Stack
    targets: tuple[str, ...] = Field(min_length=1, description="Target forms that run there.")
    compile: CompileFacts
    memory: MemoryFacts
    dtypes: tuple[DtypeFact, ...] = Field(
        min_length=1, description="Types it computes with; the first is what a recipe gets."
    )
    peak: Mapping[str, Quantity] = Field({}, description="Best speed by type of weights.")
    onchip: Quantity | None = None
    ops: Mapping[str, Mapping[str, Literal["npu", "cpu", "fail"]]] = Field(
        {}, description="Where an op runs, by type of activations, where that is not everywhere."
    )
    numeric: NumericFacts
    fitted: Mapping[str, Quantity] = {}
    points: tuple[PointFact, ...] = ()
    sources: Mapping[str, str] = Field(min_length=1)
    verified_on: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="Date of the last check.")

    _document: Document = PrivateAttr()

    @property
    def path(self) -> Path:
        """The file this device was read from."""
        return self._document.path

    def dtypes_of(self, target: str) -> tuple[DtypeFact, ...]:
        """What it computes with in this target form."""
        return tuple(dtype for dtype in self.dtypes if target in dtype.targets)

    def lacks(self, op: str) -> bool:
        """Whether an op fails there in floats, which is what scores and features are."""
        runs = self.ops.get(op, {})
        return any(runs.get(dtype) == "fail" for dtype in FLOATS)

    @model_validator(mode="after")
    def _hangs_together(self) -> Device:
        for dtype in self.dtypes:
            for target in dtype.targets:
                if target not in self.targets:
                    hint = suggest(target, self.targets)
                    raise Complaint(f"dtypes name the target {target!r}", hint=hint, key="dtypes")
        return self


class _Devices(Options):
    """The devices there are, with all their facts."""

    devices: tuple[Device, ...]


def load_device(name: str) -> Device:
    """Read the device of this name, of those in devices/."""
    files = device_files()
    if name not in files:
        raise RecipeError(f"unknown device {name!r}", hint=suggest(name, list(files)))
    return _device(read(files[name]))


def list_devices() -> list[Device]:
    """Read all devices, by name."""
    return [load_device(name) for name in sorted(device_files())]


def parse_device(text: str, path: Path | str = "device.yaml") -> Device:
    """Read a device from text, as if it stood in the file at `path`."""
    return _device(parse_text(text, Path(path)))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a device file, for editors (`devices/device.schema.json`)."""
    return {"$schema": GenerateJsonSchema.schema_dialect, **Device.model_json_schema()}


def json_schema_of_all() -> dict[str, Any]:
    """JSON Schema of what `edgevlm devices --json` prints."""
    schema = _Devices.model_json_schema(mode="serialization")
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def _device(document: Document) -> Device:
    device = document.parse(Device)
    object.__setattr__(device, "_document", document)
    if device.name != document.path.stem:
        raise document.error(
            f"the name {device.name!r} is not that of the file, {document.path.stem!r}", "name"
        )
    for keys, source in _sources(document.data):
        if source not in device.sources:
            hint = suggest(source, list(device.sources))
            raise document.error(f"no source {source!r} in sources", *keys, hint=hint)
    return device


def _sources(
    data: object, keys: tuple[str | int, ...] = ()
) -> list[tuple[tuple[str | int, ...], str]]:
    """Every `source` in the file with its place."""
    if isinstance(data, Mapping):
        found = [((*keys, "source"), data["source"])] if "source" in data else []
        children: list[tuple[str | int, object]] = list(data.items())
    elif isinstance(data, tuple):
        found, children = [], list(enumerate(data))
    else:
        return []
    for key, value in children:
        found += _sources(value, (*keys, key))
    return found
