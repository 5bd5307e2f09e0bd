"""What `inspect --audit` prints of the audits in a bundle."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from edgevlm.audit.precision import Precision
from edgevlm.audit.report import AS_ASKED, NOT_REALISED, Gone, GraphAudit, OpAudit
from edgevlm.commands.audit import audit_document, audits_of, show_audits
from edgevlm.commands.output import plain
from edgevlm_runtime.errors import BundleError

W4A16 = Precision(weights="int4", weight_granularity="group:32", activations="float32")
FLOAT = Precision(weights="float32", activations="float32")
GOOD = OpAudit(
    name="decoder.layers.0.mlp.up",
    site="decoder.layers.0.mlp.up",
    written="MatMulNBits",
    op="MatMulNBits",
    kernel="MatMulNBits 4-bit block 32 level 0",
    computes_in="float32",
    asked=W4A16,
    realised=W4A16,
    outcome=AS_ASKED,
    microseconds=1500.0,
    share=0.75,
    weight_bytes=2**20,
)
BAD = replace(
    GOOD,
    name="decoder.layers.0.mlp.down",
    kernel="MatMul",
    realised=FLOAT,
    outcome=NOT_REALISED,
    cause="weights are float32",
    hazard="u8 x s8 saturates on this processor: 3 of 2,048 pairs of weights can pass 16 bits",
    microseconds=500.0,
    share=0.25,
    weight_bytes=2**22,
)
AUDIT = GraphAudit(
    graph="step",
    engine="onnxruntime 1.2.3",
    runs=3,
    rows=(GOOD, BAD),
    gone=(
        Gone(name="a", op="Add", fate="folded"),
        Gone(name="b", op="Add", fate="fused into Gemm 'c'"),
        Gone(name="d", op="Add", fate="fused into Gemm 'e'"),
    ),
    microseconds=2600.0,
    weight_bytes=5 * 2**20,
)


def shown(*audits: GraphAudit) -> list[str]:
    text = io.StringIO()
    console = Console(file=text, width=160, highlight=False, markup=False, no_color=True)
    show_audits({"ort": audits}, console)
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


def test_tables() -> None:
    assert shown(AUDIT) == [
        "",
        "audit of ort.step (onnxruntime 1.2.3): 2 ops, 2 asked for a precision, 1 not as asked",
        "kernel weights x activations ops ms time weights",
        "MatMulNBits 4-bit block 32 level 0 int4 group:32 x float32 1 1.50 75.0% 1.0 MiB",
        "MatMul float32 x float32 1 0.50 25.0% 4.0 MiB",
        "between ops 0.60",
        "a run 2.60 5.0 MiB",
        "op asked realised outcome cause",
        "decoder.layers.0.mlp.down int4 group:32 x float32 float32 x float32 not realised "
        "weights are float32",
        "u8 x s8 saturates on this processor, 1 op:",
        "decoder.layers.0.mlp.down: 3 of 2,048 pairs of weights can pass 16 bits",
        "1 op of the file folded at load",
        "2 ops of the file fused at load",
    ]


def test_many_kernels_are_cut_with_their_sum() -> None:
    rows = tuple(
        replace(GOOD, name=f"n{i}", kernel=f"kernel {i}", microseconds=1000.0, share=1 / 15)
        for i in range(15)
    )
    lines = shown(replace(AUDIT, rows=rows, gone=()))
    assert lines[3].startswith("kernel 0 ")
    assert lines[14].startswith("kernel 11 ")
    assert lines[15].split() == ["3", "more", "3", "3.00", "20.0%", "3.0", "MiB"]


def test_a_refusal() -> None:
    refused = "onnxruntime 1.2.3 refuses the graph: no such op"
    audit = replace(AUDIT, refused=refused)
    assert shown(audit) == ["", f"audit of ort.step: {refused}"]


def test_a_bundle_without_an_audit() -> None:
    assert shown() == ["no audit: the ops of this bundle were not looked at"]
    assert audits_of({}) == {}


def test_the_document_holds_what_the_manifest_does_and_the_sums() -> None:
    provenance = json.loads(json.dumps({"audit": {"ort": [AUDIT.to_json()]}}))
    audits = audits_of(provenance)
    assert audits == {"ort": (AUDIT,)}
    (entry,) = plain(audit_document(audits))["ort"]
    sums = {name: entry.pop(name) for name in ("differences", "hazards", "by_precision")}
    assert entry == provenance["audit"]["ort"][0]
    assert sums == {
        "differences": 1,
        "hazards": 1,
        "by_precision": [
            {
                "precision": "int4 x float32",
                "count": 1,
                "microseconds": 1500.0,
                "share": 0.75,
                "weight_bytes": 2**20,
            },
            {
                "precision": "float32 x float32",
                "count": 1,
                "microseconds": 500.0,
                "share": 0.25,
                "weight_bytes": 2**22,
            },
        ],
    }


def test_an_audit_that_was_altered() -> None:
    with pytest.raises(BundleError) as found:
        audits_of({"audit": {"ort": [{**AUDIT.to_json(), "runs": "many"}]}})
    assert str(found.value).splitlines()[0] == (
        'manifest.json: provenance.audit.ort[0].runs: expected an integer, got "many"'
    )
