"""What a plan must know of a target before anything heavy is loaded: its form, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How the graphs of a target are captured.

    `state` is `inplace` (any number of rows; the graph extends its cache) or `delta` (the graph
    returns new rows). `rows` are the row counts of the step graphs, empty where T is dynamic.
    """

    state: str
    opset: int
    rows: tuple[int, ...] = ()


FORMS: Mapping[str, Form] = {
    "ort": Form(state="inplace", opset=21),
    "static": Form(state="delta", opset=19, rows=(1, 8, 32, 128)),
}
