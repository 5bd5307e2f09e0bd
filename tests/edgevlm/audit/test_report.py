"""An audit as data: there and back, its sums, and what `strict` makes of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from edgevlm.audit.precision import Precision
from edgevlm.audit.report import (
    AS_ASKED,
    FINER,
    NOT_REALISED,
    Gone,
    GraphAudit,
    OpAudit,
    Share,
    require_as_asked,
)
from edgevlm.errors import EvidenceError
from edgevlm_runtime.errors import BundleError

W4A16 = Precision(weights="int4", weight_granularity="group:32", activations="float32")
W4A8 = replace(W4A16, activations="int8", activation_granularity="group:32", dynamic=True)

ROWS = (
    OpAudit(
        name="a",
        site="a",
        written="MatMulNBits",
        op="MatMulNBits",
        kernel="MatMulNBits 4-bit block 32 level 0",
        computes_in="float32",
        asked=W4A16,
        realised=W4A16,
        outcome=AS_ASKED,
        microseconds=30.0,
        share=0.3,
        weight_bytes=100,
    ),
    OpAudit(
        name="b",
        site="b",
        written="MatMulNBits",
        op="MatMulNBits",
        computes_in="int8",
        asked=W4A16,
        realised=W4A8,
        outcome=FINER,
        cause="because",
        microseconds=20.0,
        share=0.2,
        weight_bytes=100,
    ),
    OpAudit(
        name="c",
        op="MatMul",
        computes_in="float32",
        realised=Precision(weights="float32", activations="int8"),
        hazard="may err",
        microseconds=40.0,
        share=0.4,
        weight_bytes=50,
    ),
    OpAudit(
        name="c/q", written="QuantizeLinear", op="QuantizeLinear", microseconds=5.0, share=0.05
    ),
    OpAudit(name="t", written="Transpose", op="Transpose", microseconds=5.0, share=0.05),
    OpAudit(name="d", site="d", asked=W4A16, outcome=NOT_REALISED, cause="no op of it"),
)
AUDIT = GraphAudit(
    graph="step",
    engine="onnxruntime 1.2.3",
    runs=3,
    rows=ROWS,
    gone=(Gone(name="g", op="Add", fate="folded"),),
    microseconds=120.0,
    weight_bytes=250,
)


def test_json_there_and_back() -> None:
    data = json.loads(json.dumps(AUDIT.to_json()))
    assert GraphAudit.from_json(data) == AUDIT
    assert data["rows"][4] == {
        "name": "t",
        "written": "Transpose",
        "op": "Transpose",
        "microseconds": 5.0,
        "share": 0.05,
    }


def test_json_that_no_audit_wrote() -> None:
    data = AUDIT.to_json()
    data["rows"][0]["wieght_bytes"] = 3
    with pytest.raises(BundleError) as found:
        GraphAudit.from_json(data, "manifest.json: audit")
    assert str(found.value) == (
        "manifest.json: audit.rows[0]: unknown key 'wieght_bytes'\n"
        "  hint: did you mean 'weight_bytes'?"
    )


def test_what_is_worth_a_look() -> None:
    assert [row.name for row in AUDIT.differences] == ["b", "d"]
    assert [row.name for row in AUDIT.hazards] == ["c"]
    assert [row.name for row in AUDIT.inserted] == ["c"]


def test_sums_by_precision() -> None:
    assert AUDIT.by_precision == (
        Share(
            precision="float32 x int8 in float32",
            count=1,
            microseconds=40.0,
            share=0.4,
            weight_bytes=50,
        ),
        Share(precision="int4 x float32", count=1, microseconds=30.0, share=0.3, weight_bytes=100),
        Share(precision="int4 x int8", count=1, microseconds=20.0, share=0.2, weight_bytes=100),
        Share(precision="rounding", count=1, microseconds=5.0, share=0.05, weight_bytes=0),
        Share(precision="moving", count=1, microseconds=5.0, share=0.05, weight_bytes=0),
    )


def test_strict_names_the_first_difference() -> None:
    require_as_asked([replace(AUDIT, rows=(ROWS[0], *ROWS[2:5]))])
    with pytest.raises(EvidenceError) as found:
        require_as_asked([AUDIT])
    assert (found.value.rung, found.value.site) == ("audit", "b")
    assert str(found.value) == (
        "graph 'step': 'b' is finer: because, and 1 more\n"
        "  hint: ask for what the engine does, or leave out `strict: true`"
    )


def test_strict_refuses_what_the_engine_refuses() -> None:
    audit = replace(AUDIT, rows=(), refused="onnxruntime 1.2.3 refuses the graph: no such op")
    with pytest.raises(EvidenceError) as found:
        require_as_asked([audit])
    assert str(found.value) == "graph 'step': onnxruntime 1.2.3 refuses the graph: no such op"
