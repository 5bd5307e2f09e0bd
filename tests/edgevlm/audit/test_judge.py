"""Every verdict with its whole cause."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgevlm.audit.judge import judge, judge_unasked
from edgevlm.audit.precision import Precision
from edgevlm.audit.report import AS_ASKED, COARSER, FINER, NOT_ASKED, NOT_REALISED
from edgevlm.audit.rules import Realised
from edgevlm.audit.weights import Weights

W4 = Precision(weights="int4", weight_granularity="group:32", activations="float32")
W8A8 = Precision(
    weights="int8",
    weight_granularity="channel",
    activations="int8",
    activation_granularity="token",
    dynamic=True,
)
STATIC = replace(W8A8, activation_granularity="tensor", dynamic=False)
W8A16 = replace(STATIC, activations="int16", emulated=True)
CACHE = Precision(activations="float32", state="int8", state_granularity="channel")


def realised(precision: Precision, computes_in: str = "", expanded_by: str = "") -> Realised:
    integers = {precision.weights, precision.activations} <= {"int8"}
    weights = Weights(
        dtype=precision.weights,
        granularity=precision.weight_granularity,
        columns=128,
        expanded_by=expanded_by,
    )
    return Realised(
        precision=replace(precision, emulated=False),
        kernel="K",
        computes_in=computes_in or ("int8" if integers else "float32"),
        weights=weights if precision.weights else None,
    )


@pytest.mark.parametrize(
    ("asked", "found", "outcome", "cause"),
    [
        (W4, realised(W4), AS_ASKED, ""),
        (
            W4,
            realised(replace(W4, weights="int8")),
            NOT_REALISED,
            "weights are int8, asked int4: so the file has them",
        ),
        (
            W4,
            realised(replace(W4, weights="int2")),
            COARSER,
            "weights are int2, asked int4: so the file has them",
        ),
        (
            W4,
            realised(replace(W4, weight_granularity="group:16")),
            FINER,
            "scales of weights are per group of 16, asked per group of 32",
        ),
        (
            W4,
            realised(replace(W4, weight_granularity="group:48")),
            COARSER,
            "scales of weights are per group of 48, asked per group of 32",
        ),
        (
            replace(W4, weight_granularity="channel"),
            realised(replace(W4, weight_granularity="group:128")),
            AS_ASKED,
            "",
        ),
        (
            W4,
            realised(W4, expanded_by="dq"),
            NOT_REALISED,
            "'dq' expands the int4 weights to floats in every call",
        ),
        (
            W4,
            realised(replace(W4, weights="", weight_granularity="")),
            NOT_REALISED,
            "no constant weights, asked int4",
        ),
        (
            W4,
            realised(replace(W4, activations="int8", activation_granularity="group:32")),
            COARSER,
            "K multiplies int8, asked float32",
        ),
        (
            W8A8,
            realised(W8A8, computes_in="float32"),
            NOT_REALISED,
            "K multiplies float32, of activations rounded to int8",
        ),
        (
            W8A8,
            realised(replace(W8A8, activation_granularity="tensor")),
            COARSER,
            "scales of activations are per tensor, asked per token",
        ),
        (
            W8A8,
            realised(replace(W8A8, activation_granularity="group:32")),
            FINER,
            "scales of activations are per group of 32, asked per token",
        ),
        (
            STATIC,
            realised(replace(STATIC, dynamic=True)),
            COARSER,
            "scales of activations are found in every call, asked constant",
        ),
        (
            STATIC,
            realised(W8A8),
            FINER,
            "scales of activations are per token, asked per tensor; "
            "scales of activations are found in every call, asked constant",
        ),
        (
            replace(W8A16, emulated=False),
            realised(replace(W8A16, activations="float32", activation_granularity="")),
            FINER,
            "K multiplies float32, asked int16",
        ),
        (W8A16, realised(W8A16, expanded_by="dq"), AS_ASKED, ""),
        (
            W8A16,
            realised(replace(W8A16, activations="float32", activation_granularity="")),
            NOT_REALISED,
            "activations are float32, asked int16",
        ),
        (
            W8A16,
            realised(replace(W8A16, activations="int8")),
            COARSER,
            "activations are int8, asked int16",
        ),
        (CACHE, realised(CACHE), AS_ASKED, ""),
        (
            CACHE,
            realised(replace(CACHE, state="float32", state_granularity="")),
            NOT_REALISED,
            "the cache is float32, asked int8",
        ),
        (
            CACHE,
            realised(replace(CACHE, state="int4")),
            COARSER,
            "the cache is int4, asked int8",
        ),
        (
            CACHE,
            realised(replace(CACHE, state="", state_granularity="")),
            NOT_REALISED,
            "the cache is not there, asked int8",
        ),
        (
            CACHE,
            realised(replace(CACHE, state_granularity="tensor")),
            COARSER,
            "scales of the cache are per tensor, asked per channel",
        ),
        (
            W4,
            realised(replace(W4, weight_granularity="")),
            COARSER,
            "scales of weights are not known, asked per group of 32",
        ),
    ],
)
def test_verdicts(asked: Precision, found: Realised, outcome: str, cause: str) -> None:
    assert judge(asked, found, found.weights) == (outcome, cause)


def test_what_is_folded_is_told_from_what_is_written() -> None:
    found = realised(replace(W8A8, weights="float32", weight_granularity=""))
    filed = Weights(dtype="int8", granularity="channel", columns=128)
    assert judge(W4, replace(found, computes_in="float32"), filed) == (
        NOT_REALISED,
        "weights are float32, asked int4: onnxruntime made them of the int8 in the file; "
        "K multiplies int8, asked float32",
    )
    # What is emulated is asked for its rounding, which the file has.
    assert judge(replace(STATIC, emulated=True), replace(found, precision=STATIC), filed) == (
        AS_ASKED,
        "",
    )


def test_several_differences_are_all_named_and_the_worst_counts() -> None:
    found = realised(replace(W8A8, weight_granularity="tensor", activation_granularity="group:32"))
    assert judge(W8A8, found, found.weights) == (
        COARSER,
        "scales of weights are per tensor, asked per channel; "
        "scales of activations are per group of 32, asked per token",
    )


def test_what_nobody_asked_for_is_of_floats() -> None:
    floats = Precision(weights="float32", activations="float32", state="float16")
    assert judge_unasked(realised(floats)) == (NOT_ASKED, "")
    assert judge_unasked(realised(W4)) == (
        COARSER,
        "K is int4 group:32 x float32, and nobody asked for it",
    )
    assert judge_unasked(realised(CACHE))[0] == COARSER
