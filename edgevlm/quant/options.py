"""What a recipe says of quantization: a scheme for a component, a phase or a site.

vision: w8a8                                     a name, or
decoder: {scheme: w4a16, group_size: 32, method: gptq}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from edgevlm.document import Complaint, Options, show

__all__ = [
    "FLOAT",
    "BudgetOptions",
    "CalibrationOptions",
    "KvOptions",
    "SchemeOptions",
    "SiteOptions",
    "TableOptions",
]


def _or_a_name(key: str) -> ConfigDict:
    """A mapping, or only the value of one of its keys, which the JSON schema must say."""

    def extend(schema: dict[str, Any]) -> None:
        whole = dict(schema)
        schema.clear()
        schema["anyOf"] = [{"enum": whole["properties"][key]["enum"], "type": "string"}, whole]

    return ConfigDict(json_schema_extra=extend)


SchemeName = Literal["w4a16", "w4a8", "w8a16", "w8a8", "w16a16", "fp8"]
FLOAT = "float"
"""The choice of a budget that leaves a site as it is."""

Method = Literal["rtn", "hqq", "gptq"]
Ranges = Literal["minmax", "percentile", "mse"]


class SchemeOptions(Options):
    """A scheme and how its numbers are found; absent: the device and the targets decide."""

    model_config = _or_a_name("scheme")

    scheme: SchemeName
    group_size: int | None = Field(
        None, ge=8, le=1024, description="Weights of a row that share a scale; absent: see device."
    )
    per_channel: bool = Field(False, description="A whole row shares a scale.")
    symmetric: bool = Field(True, description="Weights without zero points.")
    activations: Literal["token", "tensor", "block", "static"] | None = Field(
        None,
        description="What shares a scale: a row of a call, the call, a block of a row, or "
        "everything, by a constant from calibration.",
    )
    method: Method = Field("rtn", description="How weights are rounded.")
    ranges: Ranges | None = Field(
        None,
        description="How far the grid of weights reaches; absent: the least squared error for 4 "
        "bits, all of the weights for more.",
    )
    activation_ranges: Ranges = Field(
        "minmax", description="How far the grid of static activations reaches."
    )
    instead: Literal["w4a8"] | None = Field(
        None,
        description="For w4a16: take the kernel that rounds activations to int8 block by block, "
        "which is faster; reported as degraded.",
    )

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_name(cls, data: object) -> object:
        return {"scheme": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _hangs_together(self) -> SchemeOptions:
        if self.per_channel and self.group_size is not None:
            raise Complaint(
                f"group_size {self.group_size} and per_channel exclude each other",
                hint="remove one of them",
                key="per_channel",
            )
        if self.instead is not None and self.scheme != "w4a16":
            raise Complaint(
                f"instead: {self.instead} is for w4a16, not for {self.scheme}",
                hint="remove instead",
                key="instead",
            )
        if self.scheme == "fp8":
            self._has_no_grid()
        if self.activations is not None and not self.scheme.endswith(("a8", "fp8")):
            raise Complaint(
                f"{self.scheme} rounds activations to 16 bits or not at all: activations "
                f"{self.activations!r} has no meaning",
                hint="remove activations",
                key="activations",
            )
        return self

    def _has_no_grid(self) -> None:
        """Refuse what is about integers, which are evenly spaced."""
        for key, usual in (("symmetric", True), ("method", "rtn"), ("ranges", None)):
            value = getattr(self, key)
            if value != usual:
                raise Complaint(
                    f"{key} {show(value)} is about integers, and fp8 has none",
                    hint=f"remove {key}",
                    key=key,
                )
        if self.activation_ranges == "mse":
            raise Complaint(
                "activation_ranges 'mse' is about integers, and fp8 has none",
                hint="choose minmax or percentile",
                key="activation_ranges",
            )


class KvOptions(Options):
    """The cache of keys and values, with constant scales from calibration."""

    model_config = _or_a_name("dtype")

    dtype: Literal["int8", "int4", "float8_e4m3fn", "float8_e5m2"]
    granularity: Literal["tensor", "channel"] = Field(
        "channel", description="What shares a scale: all of a layer's keys, or one feature of them."
    )

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_name(cls, data: object) -> object:
        return {"dtype": data} if isinstance(data, str) else data


class TableOptions(Options):
    """The table of token embeddings; a tied head of the same scheme reads the same bytes."""

    model_config = _or_a_name("dtype")

    dtype: Literal["int8", "int4"]
    group_size: Literal[16, 32, 64, 128, 256] = 32

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_name(cls, data: object) -> object:
        return {"dtype": data} if isinstance(data, str) else data


class SiteOptions(Options):
    """What holds for the sites that match, whatever their component says: a scheme, or none."""

    match: str = Field(min_length=1, description="A site, or a pattern: decoder.layers.0.*")
    scheme: SchemeOptions | None = None
    skip: str | None = Field(None, min_length=1, description="Leave them in float, because ...")

    @model_validator(mode="before")
    @classmethod
    def _is_a_mapping(cls, data: object) -> object:
        if isinstance(data, Mapping) and (
            (data.get("scheme") is None) == (data.get("skip") is None)
        ):
            raise Complaint(
                "a site rule has either a scheme or skip", hint="write skip: REASON, or a scheme"
            )
        return data


# One of the two is chosen before it is read, so that complaints are about that one.
Choice = Annotated[
    Annotated[SchemeOptions, Tag("a scheme")] | Annotated[Literal["float"], Tag("no scheme")],
    Discriminator(lambda data: "no scheme" if data == FLOAT else "a scheme"),
]


class BudgetOptions(Options):
    """Mixed precision: sites may be raised to finer schemes, as far as a budget goes."""

    finer: tuple[Choice, ...] = Field(
        ("w8a16", "float"),
        min_length=1,
        validate_default=True,
        description="What a site may be raised to, besides the scheme of its component.",
    )
    max_mib: float | None = Field(
        None, gt=0, description="All linear maps together take at most so much; least harm in it."
    )
    max_accuracy_drop: float | None = Field(
        None,
        ge=0,
        le=1,
        description="The share of calibration samples that may be lost; fewest bytes for it.",
    )
    samples: int = Field(12, ge=1, le=1000, description="Samples that harm is measured on.")

    @model_validator(mode="after")
    def _has_one_bound(self) -> BudgetOptions:
        if (self.max_mib is None) == (self.max_accuracy_drop is None):
            raise Complaint(
                "a budget has one bound: max_mib or max_accuracy_drop",
                hint="name one of the two",
            )
        return self


class CalibrationOptions(Options):
    """Samples that ranges and rounding are found on."""

    data: str | None = Field(
        None,
        min_length=1,
        description="A folder with samples.jsonl, relative to the recipe; absent: the built-in "
        "picture world.",
    )
    samples: int = Field(64, ge=1, le=10_000)
    seed: int = Field(1, ge=0, lt=2**32)
