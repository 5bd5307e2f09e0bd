"""Attention over a cache in place: chunks equal the whole, as GroupQueryAttention runs it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from edgevlm_export.errors import ExportError
from edgevlm_export.lower import lower
from edgevlm_export.ops.cached_attention import OP as CACHED_ATTENTION
from edgevlm_export.targets import TARGETS
from tests.export.running import eager, lowered, op_graph, run, seeded

TOLERANCE = 3e-6  # averages of values of size 3
HEADS, KV_HEADS, SIZE, CAPACITY = 4, 2, 16, 24
WIDTHS = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
OPTIONS: dict[str, Any] = {
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "scale": 0.3,
    "softcap": 0.0,
    "window": 0,
}


def inputs(rows: int, used: int, pairs: int = SIZE // 2) -> dict[str, Tensor]:
    """Rows after `used` slots; the slots behind them hold NaN, which nobody may read."""
    past = {}
    for seed, name in ((1, "past_key"), (2, "past_value")):
        past[name] = seeded(1, KV_HEADS, CAPACITY, SIZE, seed=seed)
        past[name][:, :, used:] = torch.nan
    angles = torch.zeros(CAPACITY, pairs)
    angles[:rows] = seeded(rows, pairs, seed=3) * 5  # positions with gaps
    return {
        "q": seeded(1, rows, sum(WIDTHS)),
        **past,
        "seqlens_k": torch.tensor([used + rows - 1], dtype=torch.int32),
        "total": torch.tensor(used + rows, dtype=torch.int32),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


def reference(tensors: dict[str, Tensor], **options: Any) -> list[np.ndarray]:
    arrays: dict[str, Any] = dict.fromkeys(CACHED_ATTENTION.inputs)
    for name, tensor in tensors.items():
        arrays[name] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return list(CACHED_ATTENTION.numpy(**arrays, **options))


def assert_equal(outputs: list[np.ndarray], expected: list[np.ndarray], end: int) -> None:
    np.testing.assert_allclose(outputs[0], expected[0], atol=TOLERANCE, rtol=0)
    for out, wanted in zip(outputs[1:], expected[1:], strict=True):
        np.testing.assert_allclose(out[:, :, :end], wanted[:, :, :end], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("rows", "used", "pairs", "options"),
    [
        (6, 0, 8, {}),
        (1, 9, 8, {}),
        (5, 9, 8, {}),
        (5, 9, 4, {}),
        (5, 0, 4, {}),
        (5, 9, 8, {"softcap": 2.0}),
        (5, 9, 8, {"window": 4}),
    ],
    ids=["first", "decode", "chunk", "partial rotary", "partial first", "softcap", "window"],
)
def test_eager_and_ort_equal_the_definition(
    rows: int, used: int, pairs: int, options: dict[str, Any]
) -> None:
    tensors, options = inputs(rows, used, pairs), OPTIONS | options
    expected = reference(tensors, **options)
    assert_equal(eager(CACHED_ATTENTION, tensors, **options), expected, used + rows)
    assert_equal(lowered(CACHED_ATTENTION, "ort", tensors, **options), expected, used + rows)


def test_without_rotary() -> None:
    tensors = {name: value for name, value in inputs(5, 9).items() if name not in ("cos", "sin")}
    expected = reference(tensors, **OPTIONS)
    assert_equal(eager(CACHED_ATTENTION, tensors, **OPTIONS), expected, 14)
    assert_equal(lowered(CACHED_ATTENTION, "ort", tensors, **OPTIONS), expected, 14)


@pytest.mark.parametrize("pairs", [8, 4])
def test_three_tensors_equal_one_packed(pairs: int) -> None:
    tensors = inputs(5, 9, pairs)
    expected = reference(tensors, **OPTIONS)
    parts = torch.split(tensors.pop("q"), WIDTHS, dim=-1)
    tensors |= {name: part.contiguous() for name, part in zip("qkv", parts, strict=True)}
    assert_equal(eager(CACHED_ATTENTION, tensors, **OPTIONS), expected, 14)
    assert_equal(lowered(CACHED_ATTENTION, "ort", tensors, **OPTIONS), expected, 14)


def dynamic_graph() -> ir.Model:
    graph = op_graph(CACHED_ATTENTION, inputs(3, 0), dynamic=["q"], **OPTIONS)
    return lower(graph, TARGETS["ort"])


@pytest.mark.parametrize("chunks", [(9, 1, 6), (1, 1, 14), (3, 13)])
def test_chunks_equal_the_whole(chunks: tuple[int, ...]) -> None:
    whole = inputs(16, 0)
    expected = reference(whole, **OPTIONS)[0]
    model, start = dynamic_graph(), 0
    key, value = whole["past_key"].numpy(), whole["past_value"].numpy()
    for rows in chunks:
        end = start + rows
        tables = {name: np.zeros((CAPACITY, SIZE // 2), np.float32) for name in ("cos", "sin")}
        for name, table in tables.items():
            table[:rows] = whole[name][start:end]
        feeds = {
            "q": whole["q"][:, start:end].numpy(),
            "past_key": key,
            "past_value": value,
            "seqlens_k": np.array([end - 1], dtype=np.int32),
            "total": np.array(end, dtype=np.int32),
        }
        out, key, value = run(model, feeds | tables).values()
        np.testing.assert_allclose(out, expected[:, start:end], atol=TOLERANCE, rtol=0)
        start = end


def test_present_bound_to_past_is_written_in_place() -> None:
    tensors = inputs(5, 9)
    expected = reference(tensors, **OPTIONS)
    session = ort.InferenceSession(ir.to_proto(dynamic_graph()).SerializeToString())
    values = {
        name: ort.OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in tensors.items()
    }
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("out0")
    binding.bind_ortvalue_output("out1", values["past_key"])
    binding.bind_ortvalue_output("out2", values["past_value"])
    key, before = tensors["past_key"].numpy(), tensors["past_key"].numpy().copy()
    session.run_with_iobinding(binding)
    out = binding.get_outputs()[0].numpy()
    assert_equal([out, key, tensors["past_value"].numpy()], expected, 14)
    np.testing.assert_array_equal(key[:, :, :9], before[:, :, :9])
    assert np.isnan(key[:, :, 14:]).all()


def test_static_target_has_no_form_of_it() -> None:
    with pytest.raises(ExportError) as caught:
        lowered(CACHED_ATTENTION, "static", inputs(5, 9), **OPTIONS)
    assert str(caught.value) == (
        "graph: 'op' is cached_attention, which has no form standard\n"
        "  hint: cached_attention exists as contrib"
    )
    assert caught.value.op == "cached_attention"


def test_a_head_size_that_the_kernel_refuses_is_refused_here() -> None:
    tensors = {
        "q": seeded(1, 2, 36),
        **{name: torch.zeros(1, 1, 8, 12) for name in ("past_key", "past_value")},
        "seqlens_k": torch.tensor([1], dtype=torch.int32),
        "total": torch.tensor(2, dtype=torch.int32),
    }
    with pytest.raises(ExportError) as caught:
        lowered(CACHED_ATTENTION, "ort", tensors, **OPTIONS | {"num_heads": 1, "num_kv_heads": 1})
    assert str(caught.value) == (
        "graph: 'op' has heads of 12 numbers, GroupQueryAttention takes multiples of 8\n"
        "  hint: choose a target of standard ops"
    )
