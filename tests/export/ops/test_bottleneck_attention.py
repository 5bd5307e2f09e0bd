"""Attention of a call of which some rows are hidden and only some are kept."""

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
from edgevlm_export.ops import CLOSED
from edgevlm_export.ops.bottleneck_attention import OP as BOTTLENECK_ATTENTION
from edgevlm_export.ops.cached_attention import OP as CACHED_ATTENTION
from edgevlm_export.ops.kv_grid import stored
from edgevlm_export.targets import TARGETS
from tests.export.running import as_numpy, eager, lowered, op_graph, seeded

TOLERANCE = 3e-6  # averages of values of size 3
HEADS, KV_HEADS, SIZE, CAPACITY = 4, 2, 16, 24
WIDTHS = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
OPTIONS: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "scale": 0.3}
ROWS = 11
HIDDEN = (2, 3, 4, 7)
"""Rows that those from two rows on behind them do not see, and that are not kept."""


def inputs(used: int, pairs: int = SIZE // 2, dtype: str = "") -> dict[str, Tensor]:
    """Rows after `used` slots; the slots behind them hold what nobody may read."""
    stay = [row for row in range(ROWS) if row not in HIDDEN]
    end = used + len(stay)
    past = {}
    for seed, name in ((1, "past_key"), (2, "past_value")):
        past[name] = seeded(1, KV_HEADS, CAPACITY, SIZE, seed=seed)
        past[name][:, :, used:] = 100.0 if dtype else torch.nan
    scales = {}
    if dtype:
        random = np.random.default_rng(9)
        largest = {"int8": 127, "int4": 7}[dtype]
        for name, cache in (("k_scale", "past_key"), ("v_scale", "past_value")):
            steps = random.uniform(1.5, 3, (KV_HEADS, 1, SIZE)) / largest
            scales[name] = torch.from_numpy(steps.astype(np.float32))
            past[cache] = stored(past[cache], scales[name], dtype)
    angles = torch.zeros(CAPACITY, pairs)
    angles[:ROWS] = seeded(ROWS, pairs, seed=3) * 5
    closed = torch.zeros(1, 1, ROWS, ROWS)
    for row in HIDDEN:
        closed[..., row + 2 :, row] = CLOSED
    return {
        "q": seeded(1, ROWS, sum(WIDTHS)),
        **past,
        "seqlens_k": torch.tensor([end - 1], dtype=torch.int32),
        "total": torch.tensor(end, dtype=torch.int32),
        "closed": closed,
        "rows": torch.tensor(stay),
        "cos": angles.cos(),
        "sin": angles.sin(),
        **scales,
    }


def reference(tensors: dict[str, Tensor], **options: Any) -> list[np.ndarray]:
    arrays: dict[str, Any] = dict.fromkeys(BOTTLENECK_ATTENTION.inputs)
    for name, tensor in tensors.items():
        arrays[name] = as_numpy(tensor.double() if tensor.is_floating_point() else tensor)
    return list(BOTTLENECK_ATTENTION.numpy(**arrays, **options))


def assert_equal(outputs: list[np.ndarray], expected: list[np.ndarray], end: int) -> None:
    np.testing.assert_allclose(outputs[0], expected[0], atol=TOLERANCE, rtol=0)
    for out, wanted in zip(outputs[1:], expected[1:], strict=True):
        np.testing.assert_allclose(out[:, :, :end], wanted[:, :, :end], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("used", [0, 9])
@pytest.mark.parametrize("pairs", [8, 4])
def test_eager_and_ort_equal_the_definition(used: int, pairs: int) -> None:
    tensors = inputs(used, pairs)
    expected = reference(tensors, **OPTIONS)
    assert_equal(eager(BOTTLENECK_ATTENTION, tensors, **OPTIONS), expected, used + 7)
    assert_equal(lowered(BOTTLENECK_ATTENTION, "ort", tensors, **OPTIONS), expected, used + 7)


def test_the_definition_row_by_row() -> None:
    """Each row is a softmax over the slots and rows that it sees."""
    tensors = inputs(9)
    out, present_key, present_value = reference(tensors, **OPTIONS)
    packed = tensors["q"].double().numpy()[0]
    q, k, v = np.split(packed, np.cumsum(WIDTHS)[:2], 1)
    cos, sin = (tensors[name].double().numpy() for name in ("cos", "sin"))

    def turned(x: np.ndarray) -> np.ndarray:
        heads = x.reshape(ROWS, -1, SIZE)
        first, second = heads[..., :8], heads[..., 8:]
        c, s = cos[:ROWS, None], sin[:ROWS, None]
        return np.concatenate([first * c - second * s, second * c + first * s], -1)

    q, k, v = turned(q), turned(k), v.reshape(ROWS, -1, SIZE)
    past_k, past_v = (
        tensors[name][0, :, :9].double().numpy().transpose(1, 0, 2)
        for name in ("past_key", "past_value")
    )
    for row in range(ROWS):
        seen = [other for other in range(row + 1) if other not in HIDDEN or row < other + 2]
        for head in range(HEADS):
            keys = np.concatenate([past_k[:, head // 2], k[seen, head // 2]])
            values = np.concatenate([past_v[:, head // 2], v[seen, head // 2]])
            shares = np.exp(0.3 * keys @ q[row, head])
            found = shares @ values / shares.sum()
            part = out[0, row, head * SIZE : (head + 1) * SIZE]
            np.testing.assert_allclose(part, found, atol=1e-12, rtol=0)
    stay = [row for row in range(ROWS) if row not in HIDDEN]
    for present, new in ((present_key, k), (present_value, v)):
        np.testing.assert_allclose(
            present[0, :, 9:16], new[stay].transpose(1, 0, 2), atol=1e-12, rtol=0
        )


def test_with_nothing_hidden_it_is_attention_over_the_cache() -> None:
    tensors = inputs(9)
    tensors["rows"], tensors["closed"] = torch.arange(ROWS), torch.zeros(1, 1, ROWS, ROWS)
    tensors["seqlens_k"] = torch.tensor([9 + ROWS - 1], dtype=torch.int32)
    tensors["total"] = torch.tensor(9 + ROWS, dtype=torch.int32)
    plain = {name: x for name, x in tensors.items() if name not in ("rows", "closed")}
    expected = eager(CACHED_ATTENTION, plain, **OPTIONS)
    assert_equal(eager(BOTTLENECK_ATTENTION, tensors, **OPTIONS), expected, 9 + ROWS)
    assert_equal(lowered(BOTTLENECK_ATTENTION, "ort", tensors, **OPTIONS), expected, 9 + ROWS)


def test_three_tensors_equal_one_packed() -> None:
    tensors = inputs(9)
    expected = reference(tensors, **OPTIONS)
    parts = torch.split(tensors.pop("q"), WIDTHS, dim=-1)
    tensors |= {name: part.contiguous() for name, part in zip("qkv", parts, strict=True)}
    assert_equal(eager(BOTTLENECK_ATTENTION, tensors, **OPTIONS), expected, 16)
    assert_equal(lowered(BOTTLENECK_ATTENTION, "ort", tensors, **OPTIONS), expected, 16)


@pytest.mark.parametrize("used", [0, 9])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantized_cache(dtype: str, used: int) -> None:
    tensors, end = inputs(used, dtype=dtype), used + 7
    expected = reference(tensors, **OPTIONS, kv_dtype=dtype)
    graph = op_graph(
        BOTTLENECK_ATTENTION,
        tensors,
        constants=("k_scale", "v_scale"),
        **OPTIONS,
        kv_dtype=dtype,
    )
    session = ort.InferenceSession(
        ir.to_proto(lower(graph, TARGETS["ort"])).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    fed = {name: as_numpy(x) for name, x in tensors.items() if not name.endswith("_scale")}
    for outputs in (
        eager(BOTTLENECK_ATTENTION, tensors, **OPTIONS, kv_dtype=dtype),
        session.run(None, fed),
    ):
        np.testing.assert_allclose(outputs[0], expected[0], atol=TOLERANCE, rtol=0)
        for out, wanted in zip(outputs[1:], expected[1:], strict=True):
            np.testing.assert_array_equal(out[:, :, :end], wanted[:, :, :end])


def test_present_bound_to_past_is_written_in_place() -> None:
    tensors = inputs(9)
    expected = reference(tensors, **OPTIONS)
    graph = lower(op_graph(BOTTLENECK_ATTENTION, tensors, **OPTIONS), TARGETS["ort"])
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
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
    assert_equal([out, key, tensors["past_value"].numpy()], expected, 16)
    np.testing.assert_array_equal(key[:, :, :9], before[:, :, :9])
    assert np.isnan(key[:, :, 16:]).all()


def test_static_target_has_no_form_of_it() -> None:
    with pytest.raises(ExportError) as caught:
        lowered(BOTTLENECK_ATTENTION, "static", inputs(9), **OPTIONS)
    assert str(caught.value) == (
        "graph: 'op' is bottleneck_attention, which has no form standard\n"
        "  hint: bottleneck_attention exists as contrib"
    )
