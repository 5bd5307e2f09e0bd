"""Precision: what the numbers of an op are rounded to, and which of two precisions is finer.

A dtype is at least as fine as another if it holds all values of the other, up to one scale. So
float32 is finer than int16, int8 is finer than int4, and neither of int8 and float8 is finer. A
granularity is at least as fine as another if its scales can repeat those of the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

__all__ = ["Precision", "at_least_as_fine", "bits", "can_repeat"]

_HELD = {
    "float32": "float16 bfloat16 int16 int8 int4 int2 float8_e4m3fn float8_e5m2",
    "float16": "int8 int4 int2 float8_e4m3fn float8_e5m2",
    "bfloat16": "int8 int4 int2 float8_e4m3fn float8_e5m2",
    "int16": "int8 int4 int2",
    "int8": "int4 int2",
    "float8_e4m3fn": "int4 int2",
    "float8_e5m2": "int4 int2",
    "int4": "int2",
    "int2": "",
}
_FINER = {dtype: frozenset(held.split()) | {dtype} for dtype, held in _HELD.items()}
_GRANULARITY = re.compile(r"|tensor|channel|token|input|group:[1-9]\d*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """What the weights and the activations of an op are rounded to; empty where it has none.

    `weight_granularity` is `tensor`, `channel`, `group:32`, or `input` (a scale for each column of
    weights [N, K], which no product can take out of its sum); `activation_granularity` is `tensor`,
    `token` or `group:32`. Scales of activations are constants, or `dynamic`: found in every call.
    `state` is the dtype of an attention's cache. `emulated` asks for the rounding alone, whatever
    multiplies afterwards: what the host does for a device that it is not.
    """

    weights: str = ""
    activations: str = ""
    weight_granularity: str = ""
    activation_granularity: str = ""
    dynamic: bool = False
    state: str = ""
    state_granularity: str = ""
    emulated: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a word that is no dtype, or no granularity."""
        for dtype in (self.weights, self.activations, self.state):
            if dtype and dtype not in _FINER:
                raise ValueError(f"{dtype!r} is not one of {', '.join(_FINER)}")
        for word in (self.weight_granularity, self.activation_granularity, self.state_granularity):
            if not _GRANULARITY.fullmatch(word):
                raise ValueError(f"{word!r} is not tensor, channel, token, input or group:SIZE")

    def __str__(self) -> str:
        """Format as `int4 group:32 x int8 token`, with `static` behind a constant scale."""
        fixed = "static" if self.activation_granularity and not self.dynamic else ""
        activations = _joined(self.activations, self.activation_granularity, fixed)
        weights = _joined(self.weights, self.weight_granularity)
        product = " x ".join(part for part in (weights, activations) if part)
        cache = _joined(", cache", self.state, self.state_granularity) if self.state else ""
        return f"{product}{cache}{', emulated' if self.emulated else ''}"

    def over(self, columns: int | None) -> Precision:
        """The same, where a group is all columns of a row, or more, said as a channel or a row."""
        if columns is None:
            return self
        return replace(
            self,
            weight_granularity=_whole(self.weight_granularity, columns, "channel"),
            activation_granularity=_whole(self.activation_granularity, columns, "token"),
        )


def at_least_as_fine(dtype: str, other: str) -> bool:
    """Whether a dtype holds every value of another, up to a scale."""
    return other in _FINER[dtype]


def can_repeat(granularity: str, other: str) -> bool:
    """Whether scales of a granularity can give each number the scale that the other gives it."""
    if other in ("", "tensor", granularity):
        return True
    if not granularity.startswith("group:") or other == "input":
        return False
    return not other.startswith("group:") or _size(other) % _size(granularity) == 0


def bits(dtype: str) -> int:
    """Bits of a number."""
    found = re.search(r"\d+", dtype)
    assert found is not None
    return int(found[0])


def _joined(*words: str) -> str:
    return " ".join(word for word in words if word)


def _size(granularity: str) -> int:
    return int(granularity.removeprefix("group:"))


def _whole(granularity: str, columns: int, name: str) -> str:
    grouped = granularity.startswith("group:")
    return name if grouped and _size(granularity) >= columns else granularity
