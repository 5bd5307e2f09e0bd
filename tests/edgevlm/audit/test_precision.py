"""Which precision is finer, against the values that the dtypes have."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from edgevlm.audit.precision import Precision, at_least_as_fine, bits, can_repeat

INTEGERS = {"int2": 2, "int4": 4, "int8": 8, "int16": 16}
FLOATS = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}


def values(dtype: str) -> np.ndarray:
    """All finite values of a dtype of at most 16 bits."""
    if dtype in INTEGERS:
        most = 2 ** (INTEGERS[dtype] - 1)
        return np.arange(-most, most, dtype=np.float64)
    kind = FLOATS[dtype]
    codes = np.arange(2 ** bits(dtype), dtype=f"uint{bits(dtype)}").view(kind)
    with np.errstate(invalid="ignore"):
        found = codes.astype(np.float64)
    return found[np.isfinite(found)]


def holds(dtype: str, numbers: np.ndarray) -> bool:
    """Whether a dtype has all these numbers, times some power of two."""
    for power in range(-24, 25):
        scaled = np.ldexp(numbers, power)
        if dtype in INTEGERS:
            most = 2 ** (INTEGERS[dtype] - 1)
            kept = np.clip(np.round(scaled), -most, most - 1)
        else:
            with np.errstate(over="ignore"):
                kept = scaled.astype(FLOATS[dtype]).astype(np.float64)
        if np.array_equal(kept, scaled):
            return True
    return False


@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        pair
        for pair in itertools.product((*INTEGERS, *FLOATS), repeat=2)
        if pair[1] != "float32"  # 2^32 values: only itself has them
    ],
)
def test_a_finer_dtype_has_every_value_of_the_other(dtype: str, other: str) -> None:
    assert at_least_as_fine(dtype, other) == holds(dtype, values(other))


@pytest.mark.parametrize("dtype", [*INTEGERS, "float16", "bfloat16", "float8_e5m2"])
def test_nothing_is_as_fine_as_float32(dtype: str) -> None:
    assert not at_least_as_fine(dtype, "float32")
    assert at_least_as_fine("float32", dtype)


def repeats(granularity: str, other: str, rows: int = 4, columns: int = 192) -> bool:
    """Whether scales of one granularity can be set so that each number has the other's."""

    def owners(word: str) -> np.ndarray:
        row, column = np.indices((rows, columns))
        if word.startswith("group:"):
            return row * columns + column // int(word[6:])
        whole = np.zeros_like(row)
        return {"tensor": whole, "channel": row, "token": row, "input": column}[word]

    mine, theirs = owners(granularity).ravel(), owners(other).ravel()
    return all(len(set(theirs[mine == owner])) == 1 for owner in set(mine))


@pytest.mark.parametrize("other", ["tensor", "channel", "input", "group:32", "group:64"])
@pytest.mark.parametrize(
    "granularity", ["tensor", "channel", "input", "group:16", "group:32", "group:48", "group:64"]
)
def test_a_finer_granularity_can_repeat_the_scales_of_the_other(
    granularity: str, other: str
) -> None:
    assert can_repeat(granularity, other) == repeats(granularity, other)


def test_a_group_of_all_columns_is_a_channel_or_a_row() -> None:
    asked = Precision(
        weights="int4",
        weight_granularity="group:64",
        activations="int8",
        activation_granularity="group:128",
        dynamic=True,
    )
    whole = asked.over(64)
    assert (whole.weight_granularity, whole.activation_granularity) == ("channel", "token")
    assert asked.over(96).weight_granularity == "group:64"
    assert asked.over(None) == asked


@pytest.mark.parametrize(
    ("precision", "text"),
    [
        (
            Precision(weights="int4", weight_granularity="group:32", activations="float32"),
            "int4 group:32 x float32",
        ),
        (
            Precision(
                weights="int8",
                weight_granularity="channel",
                activations="int16",
                activation_granularity="tensor",
                emulated=True,
            ),
            "int8 channel x int16 tensor static, emulated",
        ),
        (
            Precision(activations="float32", state="int8", state_granularity="channel"),
            "float32, cache int8 channel",
        ),
    ],
)
def test_text(precision: Precision, text: str) -> None:
    assert str(precision) == text


def test_words_that_are_no_precision() -> None:
    with pytest.raises(ValueError, match="int7") as dtype:
        Precision(weights="int7")
    assert str(dtype.value) == (
        "'int7' is not one of float32, float16, bfloat16, int16, int8, float8_e4m3fn, "
        "float8_e5m2, int4, int2"
    )
    with pytest.raises(ValueError, match="group") as granularity:
        Precision(weights="int8", weight_granularity="group:0")
    assert str(granularity.value) == (
        "'group:0' is not tensor, channel, token, input or group:SIZE"
    )
