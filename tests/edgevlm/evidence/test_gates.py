"""Bounds of graphs whose model rounds: as far apart as rounding itself, and no further."""

from __future__ import annotations

import pytest

from edgevlm.evidence.gates import Bound, judge, limits, parting
from edgevlm.recipe import EvidenceOptions


def test_a_rounded_model_loosens_only_what_it_lost() -> None:
    bounds = {"cosine": Bound(value=0.999), "kl": Bound(value=1e-3)}
    found = parting(bounds, {"vision.cosine": 0.998, "projector.cosine": 0.9999, "decoder.kl": 0.2})
    assert found["vision.cosine"].value == pytest.approx(0.996)
    assert found["projector.cosine"].value == 0.999
    assert found["decoder.kl"].value == 0.4
    assert found["cosine"] == bounds["cosine"]
    gates = judge({"vision.cosine": 0.9961, "projector.cosine": 0.9961, "decoder.kl": 0.41}, found)
    assert [gate.passed for gate in gates] == [True, False, False]


def test_a_nan_fails() -> None:
    (gate,) = judge({"vision.cosine": float("nan")}, {"cosine": Bound(value=0.5)})
    assert not gate.passed


def test_drawn_weights_lose_nothing() -> None:
    options = EvidenceOptions()
    assert limits(options, quantized=True, drawn=True)["quantized"] == {}
    assert set(limits(options, quantized=True, drawn=True)["graph"]) == {"cosine", "kl"}
    assert limits(options, quantized=True, drawn=True)["runtime"] == {}
    trained = limits(options, quantized=True)["quantized"]
    assert {name: bound.value for name, bound in trained.items()} == {
        "accuracy_drop": 0.03,
        "kl": 0.1,
        "argmax_agreement": 0.9,
    }
