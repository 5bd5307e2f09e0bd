"""What a plan must know of a target before anything heavy is loaded: its form, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

STEP_ROWS = (1, 8, 32, 128)
"""Rows of the step graphs of fixed shape: a token, a few drafts, a chunk of a prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How the graphs of a target are captured.

    `state` is `inplace` (any number of rows; the graph extends its cache) or `delta` (the graph
    returns new rows). `rows` are the row counts of the step graphs, empty where T is dynamic.
    `caches` are the dtypes that a quantized cache may have. Activations asked in 16 bits become
    `wide`, and static ones have no zero point where they are `symmetric`.
    """

    state: str
    opset: int
    rows: tuple[int, ...] = ()
    caches: tuple[str, ...]
    wide: Literal["float32", "int16"] = "float32"
    symmetric: bool = False


FORMS: Mapping[str, Form] = {
    "ort": Form(state="inplace", opset=21, caches=("int8", "int4")),
    "static": Form(
        state="delta",
        opset=19,
        rows=STEP_ROWS,
        caches=("int8", "float8_e4m3fn", "float8_e5m2"),
        wide="int16",
    ),
    "tensorrt": Form(
        state="delta",
        opset=21,
        rows=STEP_ROWS,
        caches=("int8", "float8_e4m3fn"),
        symmetric=True,
    ),
}
