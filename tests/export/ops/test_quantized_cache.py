"""Attention over a quantized cache: eager, both contrib forms and the standard one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from edgevlm_export.errors import ExportError
from edgevlm_export.lower import lower
from edgevlm_export.ops import CLOSED
from edgevlm_export.ops.cached_attention import OP as CACHED_ATTENTION
from edgevlm_export.ops.kv_grid import numpy_restored, numpy_stored, restored, rounded, stored
from edgevlm_export.ops.masked_attention import OP as MASKED_ATTENTION
from edgevlm_export.ops.op import Op
from edgevlm_export.targets import TARGETS
from tests.export.running import as_numpy, eager, op_graph, run, seeded

TOLERANCE = 3e-6  # averages of values of size 3
HEADS, KV_HEADS, SIZE, SLOTS = 4, 2, 16, 24
PACKED = (HEADS + 2 * KV_HEADS) * SIZE
GRIDS = ("int8", "int4", "float8_e4m3fn", "float8_e5m2")
LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448, "float8_e5m2": 57344}
ONNX_TYPES = {
    np.dtype(ml_dtypes.float8_e4m3fn): ir.DataType.FLOAT8E4M3FN,
    np.dtype(ml_dtypes.float8_e5m2): ir.DataType.FLOAT8E5M2,
}
CONSTANTS = ("k_scale", "v_scale")


def scales(dtype: str, granularity: str) -> dict[str, Tensor]:
    """Scales for normal numbers, some of which lie beyond the largest of the grid."""
    shape = (1,) if granularity == "tensor" else (KV_HEADS, 1, SIZE)
    random = np.random.default_rng(9)
    return {
        name: torch.from_numpy((random.uniform(1.5, 3, shape) / LARGEST[dtype]).astype(np.float32))
        for name in CONSTANTS
    }


def cache(name: str, scale: Tensor, dtype: str) -> Tensor:
    rows = seeded(1, KV_HEADS, SLOTS, SIZE, seed=1 if name == "past_key" else 2)
    return stored(rows, scale, dtype)


def inputs(op: Op, dtype: str, granularity: str, rows: int, used: int) -> dict[str, Tensor]:
    """Rows after `used` slots; what lies behind these is old, and nobody may read it."""
    steps = scales(dtype, granularity)
    past = {
        f"past_{part}": cache(f"past_{part}", steps[scale], dtype)
        for part, scale in (("key", "k_scale"), ("value", "v_scale"))
    }
    angles = seeded(rows, SIZE // 2, seed=3) * 5
    tensors = {"q": seeded(1, rows, PACKED), **past, **steps}
    if op is MASKED_ATTENTION:
        mask = torch.full((1, 1, rows, SLOTS + rows), CLOSED)
        mask[..., :used] = 0
        mask[..., SLOTS:] = torch.full((rows, rows), CLOSED).triu(1)
        return {**tensors, "mask": mask, "cos": angles.cos(), "sin": angles.sin()}
    tables = torch.zeros(2, SLOTS, SIZE // 2)
    tables[:, :rows] = torch.stack([angles.cos(), angles.sin()])
    lengths = {
        "seqlens_k": torch.tensor([used + rows - 1], dtype=torch.int32),
        "total": torch.tensor(used + rows, dtype=torch.int32),
    }
    return {**tensors, **lengths, "cos": tables[0], "sin": tables[1]}


def options(op: Op, dtype: str, **changes: Any) -> dict[str, Any]:
    fixed = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "scale": 0.3, "kv_dtype": dtype}
    return fixed | changes


def reference(op: Op, tensors: Mapping[str, Tensor], **attributes: Any) -> list[np.ndarray]:
    """The definition, with float64 where there is float32."""
    arrays: dict[str, Any] = dict.fromkeys(op.inputs)
    for name, tensor in tensors.items():
        arrays[name] = as_numpy(tensor.double() if tensor.dtype == torch.float32 else tensor)
    return list(op.numpy(**arrays, **attributes))


def in_graph(op: Op, target: str, tensors: Mapping[str, Tensor], **attributes: Any) -> list[Any]:
    """What ONNX Runtime gives, whose Python interface takes float8 as bytes with a type."""
    model = lower(op_graph(op, tensors, constants=CONSTANTS, **attributes), TARGETS[target])
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    for name, value in TARGETS[target].engine.options.items():
        settings.add_session_config_entry(name, value)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings)
    binding = session.io_binding()
    outputs = [np.zeros(x.shape, x.dtype) for x in eager(op, tensors, **attributes)]
    fed = [as_numpy(tensors[value.name or ""]) for value in model.graph.inputs]
    for put, names, arrays in (
        (binding.bind_ortvalue_input, [value.name for value in model.graph.inputs], fed),
        (binding.bind_ortvalue_output, [value.name for value in model.graph.outputs], outputs),
    ):
        for name, array in zip(names, arrays, strict=True):
            put(name, ort_value(array))
    session.run_with_iobinding(binding)
    return outputs


def ort_value(array: np.ndarray) -> ort.OrtValue:
    kind = ONNX_TYPES.get(array.dtype)
    if kind is None:
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), kind)


def assert_equal(outputs: list[np.ndarray], expected: list[np.ndarray], end: int) -> None:
    np.testing.assert_allclose(outputs[0], expected[0], atol=TOLERANCE, rtol=0)
    for out, wanted in zip(outputs[1:], expected[1:], strict=True):
        assert out.dtype == wanted.dtype
        np.testing.assert_array_equal(out[:, :, :end], wanted[:, :, :end])


@pytest.mark.parametrize("dtype", GRIDS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_grids_are_their_definition(dtype: str, granularity: str) -> None:
    """Every step of the grid, every tie between two, and what lies beyond."""
    scale = scales(dtype, granularity)["k_scale"] * 0 + 0.25
    largest = LARGEST[dtype]
    halves = torch.linspace(-1.5 * largest, 1.5 * largest, 6 * largest + 1)[: 64 * 512]
    rows = (halves if dtype in ("int8", "int4") else seeded(4096) * largest).repeat(SIZE)
    rows = rows[: len(rows) // (KV_HEADS * SIZE) * KV_HEADS * SIZE] * 0.25
    rows = rows.view(1, KV_HEADS, -1, SIZE)
    codes = stored(rows, scale, dtype)
    wanted = numpy_stored(rows.double().numpy(), scale.double().numpy(), dtype)
    np.testing.assert_array_equal(as_numpy(codes), wanted)
    numbers = restored(codes, scale, dtype)
    np.testing.assert_array_equal(numbers, numpy_restored(wanted, scale.numpy(), dtype))
    assert torch.equal(rounded(numbers, scale, dtype), numbers)


@pytest.mark.parametrize("dtype", GRIDS)
def test_zero_is_on_every_grid(dtype: str) -> None:
    zero = torch.zeros(1, 1, 1, 8)
    assert torch.equal(rounded(zero, torch.tensor([0.3]), dtype), zero)


CALLS = [(6, 0), (1, 9), (5, 9)]
CALL_NAMES = ["first", "decode", "chunk"]


@pytest.mark.parametrize(("rows", "used"), CALLS, ids=CALL_NAMES)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_contrib_equals_the_definition(dtype: str, granularity: str, rows: int, used: int) -> None:
    tensors = inputs(CACHED_ATTENTION, dtype, granularity, rows, used)
    attributes = options(CACHED_ATTENTION, dtype)
    expected = reference(CACHED_ATTENTION, tensors, **attributes)
    assert_equal(eager(CACHED_ATTENTION, tensors, **attributes), expected, used + rows)
    for prompt in (False, True):
        outputs = in_graph(CACHED_ATTENTION, "ort", tensors, **attributes, prompt=prompt)
        assert_equal(outputs, expected, used + rows)


@pytest.mark.parametrize("prompt", [False, True], ids=["fused", "prompt"])
@pytest.mark.parametrize("change", [{"softcap": 2.0}, {"window": 4}], ids=["softcap", "window"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_contrib_with_softcap_and_windows(dtype: str, change: dict[str, Any], prompt: bool) -> None:
    attributes = options(CACHED_ATTENTION, dtype, prompt=prompt, **change)
    for rows, used in ((5, 0), (5, 9), (1, 9)):
        tensors = inputs(CACHED_ATTENTION, dtype, "channel", rows, used)
        expected = reference(CACHED_ATTENTION, tensors, **attributes)
        assert_equal(eager(CACHED_ATTENTION, tensors, **attributes), expected, used + rows)
        outputs = in_graph(CACHED_ATTENTION, "ort", tensors, **attributes)
        assert_equal(outputs, expected, used + rows)


@pytest.mark.parametrize("prompt", [False, True], ids=["fused", "prompt"])
def test_contrib_of_three_tensors_and_without_rotary(prompt: bool) -> None:
    attributes = options(CACHED_ATTENTION, "int8", prompt=prompt)
    tensors = inputs(CACHED_ATTENTION, "int8", "channel", 5, 9)
    widths = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
    parts = torch.split(tensors.pop("q"), widths, dim=-1)
    tensors |= {name: part.contiguous() for name, part in zip("qkv", parts, strict=True)}
    for _ in range(2):
        expected = reference(CACHED_ATTENTION, tensors, **attributes)
        assert_equal(in_graph(CACHED_ATTENTION, "ort", tensors, **attributes), expected, 14)
        tensors = {name: x for name, x in tensors.items() if name not in ("cos", "sin")}


@pytest.mark.parametrize(("rows", "used"), CALLS, ids=CALL_NAMES)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_standard_equals_the_definition(dtype: str, granularity: str, rows: int, used: int) -> None:
    tensors = inputs(MASKED_ATTENTION, dtype, granularity, rows, used)
    attributes = options(MASKED_ATTENTION, dtype, softcap=2.0 if rows == 5 else 0.0)
    expected = reference(MASKED_ATTENTION, tensors, **attributes)
    assert_equal(eager(MASKED_ATTENTION, tensors, **attributes), expected, rows)
    assert_equal(in_graph(MASKED_ATTENTION, "static", tensors, **attributes), expected, rows)


@pytest.mark.parametrize("op", [CACHED_ATTENTION, MASKED_ATTENTION], ids=["inplace", "delta"])
@pytest.mark.parametrize("dtype", GRIDS)
def test_a_cache_may_hold_the_numbers_themselves(op: Op, dtype: str) -> None:
    """Bit by bit what codes give, so that a loop in torch need not know how a cache is stored."""
    tensors = inputs(op, dtype, "channel", 5, 9)
    out, *codes = op.overload(**arguments(op, tensors, dtype))
    steps = {f"past_{part}": tensors[f"{part[0]}_scale"] for part in ("key", "value")}
    floats = {name: restored(tensors[name], scale, dtype) for name, scale in steps.items()}
    also, *numbers = op.overload(**arguments(op, tensors | floats, dtype))
    assert torch.equal(also, out)
    for number, code, scale in zip(numbers, codes, steps.values(), strict=True):
        assert torch.equal(number, restored(code, scale, dtype))


def arguments(op: Op, tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Any]:
    return dict.fromkeys(op.inputs) | dict(tensors) | options(op, dtype)


@pytest.mark.parametrize("prompt", [False, True], ids=["fused", "prompt"])
@pytest.mark.parametrize("chunks", [(9, 1, 6), (1, 1, 14), (3, 13)])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_chunks_equal_the_whole(dtype: str, chunks: tuple[int, ...], prompt: bool) -> None:
    whole = inputs(CACHED_ATTENTION, dtype, "channel", 16, 0)
    attributes = options(CACHED_ATTENTION, dtype, prompt=prompt)
    expected = reference(CACHED_ATTENTION, whole, **attributes)
    example = inputs(CACHED_ATTENTION, dtype, "channel", 3, 0)
    graph = op_graph(CACHED_ATTENTION, example, constants=CONSTANTS, dynamic=["q"], **attributes)
    model, start = lower(graph, TARGETS["ort"]), 0
    key, value = whole["past_key"].numpy(), whole["past_value"].numpy()
    for rows in chunks:
        end = start + rows
        tables = {name: np.zeros((SLOTS, SIZE // 2), np.float32) for name in ("cos", "sin")}
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
        np.testing.assert_allclose(out, expected[0][:, start:end], atol=TOLERANCE, rtol=0)
        start = end
    np.testing.assert_array_equal(key[:, :, :16], expected[1][:, :, :16])
    np.testing.assert_array_equal(value[:, :, :16], expected[2][:, :, :16])


@pytest.mark.parametrize("prompt", [False, True], ids=["fused", "prompt"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_present_bound_to_past_is_written_in_place(dtype: str, prompt: bool) -> None:
    """What is not written stays, and rows written again after a rewind give the same bits."""
    tensors = inputs(CACHED_ATTENTION, dtype, "tensor", 5, 9)
    attributes = options(CACHED_ATTENTION, dtype, prompt=prompt)
    graph = op_graph(CACHED_ATTENTION, tensors, constants=CONSTANTS, **attributes)
    session = ort.InferenceSession(ir.to_proto(lower(graph, TARGETS["ort"])).SerializeToString())
    fed = {name: tensor for name, tensor in tensors.items() if name not in CONSTANTS}
    before = {name: fed[name].numpy().copy() for name in ("past_key", "past_value")}
    values = {name: ort.OrtValue.ortvalue_from_numpy(x.numpy()) for name, x in fed.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("out0")
    binding.bind_ortvalue_output("out1", values["past_key"])
    binding.bind_ortvalue_output("out2", values["past_value"])
    outs = []
    for _ in range(2):
        session.run_with_iobinding(binding)
        outs.append(binding.get_outputs()[0].numpy().copy())
    np.testing.assert_array_equal(*outs)
    expected = reference(
        CACHED_ATTENTION, inputs(CACHED_ATTENTION, dtype, "tensor", 5, 9), **attributes
    )
    written = [fed["past_key"].numpy(), fed["past_value"].numpy()]
    assert_equal([outs[0], *written], expected, 14)
    for name, now in zip(before, written, strict=True):
        np.testing.assert_array_equal(now[:, :, 14:], before[name][:, :, 14:])


def refused(op: Op, target: str, dtype: str) -> str:
    with pytest.raises(ExportError) as caught:
        in_graph(op, target, inputs(op, dtype, "tensor", 1, 9), **options(op, dtype))
    assert caught.value.op == op.name
    return str(caught.value)


def test_what_a_form_cannot_keep_is_refused() -> None:
    assert refused(CACHED_ATTENTION, "ort", "float8_e4m3fn") == (
        "graph: 'op' has a cache of float8_e4m3fn, GroupQueryAttention takes int8 and int4\n"
        "  hint: choose int8, or a target of standard ops"
    )
    assert refused(MASKED_ATTENTION, "static", "int4") == (
        "graph: 'op' has a cache of int4, standard ops pack no two numbers in a byte\n"
        "  hint: choose int8 or float8_e4m3fn, or a target with GroupQueryAttention"
    )
