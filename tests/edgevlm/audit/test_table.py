"""The audit of embedding tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from edgevlm.audit.precision import Precision
from edgevlm.audit.report import AS_ASKED, COARSER, NOT_ASKED, NOT_REALISED
from edgevlm.audit.table import audit_table
from edgevlm_runtime.manifest import EngineSpec, GraphSpec

INT4 = Precision(weights="int4", weight_granularity="group:16")


def spec(bits: int = 0) -> GraphSpec:
    options = {"bits": str(bits), "block_size": "16"} if bits else {}
    return GraphSpec(
        name="embedding",
        role="embedding",
        file="table.npy",
        engine=EngineSpec(kind="table", options=options),
        inputs=(),
        outputs=(),
        weights=("scales.npy",) if bits else (),
    )


def test_float_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.zeros((10, 64), np.float32))
    (row,) = audit_table(tmp_path, spec(), {}).rows
    assert (row.outcome, row.weight_bytes) == (NOT_ASKED, 10 * 64 * 4)
    (row,) = audit_table(tmp_path, spec(), {"embedding": INT4}).rows
    assert (row.outcome, row.cause) == (
        NOT_REALISED,
        "weights are float32, asked int4: so the file has them",
    )


def test_quantized_rows(tmp_path: Path) -> None:
    scales = np.random.default_rng(0).random((10, 4)).astype(np.float32)
    np.save(tmp_path / "table.npy", np.zeros((10, 4, 8), np.uint8))
    np.save(tmp_path / "scales.npy", scales)
    audit = audit_table(tmp_path, spec(4), {"embedding": INT4})
    assert [(row.outcome, row.cause) for row in audit.rows] == [(AS_ASKED, "")]
    assert audit.weight_bytes == 10 * 64 // 2 + 10 * 4 * 4
    # A scheme speaks of activations too: rows that are looked up have none.
    asked = {"embedding": replace(INT4, activations="float32")}
    assert audit_table(tmp_path, spec(4), asked).differences == ()

    np.save(tmp_path / "scales.npy", np.repeat(scales[:, :1], 4, axis=1))
    (row,) = audit_table(tmp_path, spec(4), {"embedding": INT4}).rows
    assert (row.outcome, row.cause) == (
        COARSER,
        "scales of weights are per channel, asked per group of 16",
    )
    (row,) = audit_table(tmp_path, spec(4), {}).rows
    assert (row.outcome, row.cause) == (COARSER, "table is int4 channel, and nobody asked for it")
