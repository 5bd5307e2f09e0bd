"""Integers, scales and layouts: against loops, ONNX's reference implementation and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgevlm.quant.affine import (
    QuantTensor,
    container_bits,
    float8_scales,
    onnx_array,
    pack_nbits,
    quantize,
    to_float8,
    unpack_nbits,
)
from edgevlm.quant.rtn import rtn
from tests.edgevlm.quant import slow

# K that groups of 32 divide, do not divide, and exceed.
COLUMNS = [64, 80, 24]


def model_of(
    node: onnx.NodeProto,
    constants: dict[str, Any],
    inputs: dict[str, Any],
    output: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A graph of one node with output `y`."""
    x = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs]
    y = [helper.make_tensor_value_info("y", output, None)]
    tensors = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name)
        for name, value in constants.items()
    ]
    graph = helper.make_graph([node], "graph", x, y, tensors)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 16])
def test_rounds_as_a_loop_does(bits: int, symmetric: bool, group_size: int, columns: int) -> None:
    weight = slow.drawn_weight(6, columns)
    tensor = rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    assert tensor.values.dtype == (torch.int16 if bits > 8 else torch.int8)
    assert (tensor.zero is None) == symmetric
    meant = tensor.dequantize().numpy()
    for row in range(6):
        for group, span in enumerate(slow.groups_of(columns, group_size)):
            scale = tensor.scale[row, group].numpy()
            zero = 0 if tensor.zero is None else int(tensor.zero[row, group])
            for column in range(span.start, span.stop):
                value = slow.round_to(weight[row, column].numpy() / scale, zero, bits)
                assert int(tensor.values[row, column]) == value
                assert meant[row, column] == np.float32(value - zero) * scale


def test_rounds_half_to_even_and_clamps() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.5, 40.0, -40.0]])
    scale = torch.ones(1, 1)
    tensor = quantize(weight, scale, None, bits=4, group_size=0)
    assert tensor.values.tolist() == [[0, 2, 2, 0, -2, 7, 7, -8]]
    tensor = quantize(weight, scale, None, bits=4, group_size=0, narrow=True)
    assert tensor.values.tolist() == [[0, 2, 2, 0, -2, 7, 7, -7]]
    zero = torch.tensor([[-3]], dtype=torch.int8)
    tensor = quantize(weight, scale, zero, bits=4, group_size=0)
    assert tensor.values.tolist() == [[-3, -1, -1, -3, -5, 5, 7, -8]]
    assert tensor.dequantize().tolist() == [[0.0, 2.0, 2.0, 0.0, -2.0, 8.0, 10.0, -5.0]]


def test_seven_bits_in_int8() -> None:
    tensor = rtn(slow.drawn_weight(8, 48), bits=7, group_size=0, symmetric=True)
    assert tensor.values.dtype == torch.int8
    assert (int(tensor.values.min()), int(tensor.values.max())) == (-64, 63)


@pytest.mark.parametrize("bits", [1, 17])
def test_refuses_other_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"^{bits} bits are not within 2 to 16$"):
        rtn(torch.ones(2, 4), bits=bits, group_size=0, symmetric=True)


@pytest.mark.parametrize("group_size", [0, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_packs_what_matmul_nbits_reads(
    bits: int, columns: int, symmetric: bool, group_size: int
) -> None:
    """The identity times the weights gives them back bit for bit, negative scales included."""
    weight = slow.drawn_weight(10, columns, seed=bits)
    tensor = rtn(
        weight,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        ranges="mse_signed" if symmetric else "minmax",
    )
    eye = np.eye(columns, dtype=np.float32)
    got = matmul_nbits(tensor, 32, eye, accuracy_level=0)
    np.testing.assert_array_equal(got, tensor.dequantize().T.numpy())


def matmul_nbits(
    tensor: QuantTensor, block_size: int, x: np.ndarray, *, accuracy_level: int
) -> np.ndarray:
    """x times the packed weights in ONNX Runtime."""
    packed, scales, zeros = pack_nbits(tensor, block_size)
    constants = {"packed": packed.numpy(), "scales": scales.contiguous().numpy()}
    if zeros is not None:
        constants["zeros"] = zeros.numpy()
    node = helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        K=tensor.values.shape[1],
        N=len(tensor.values),
        bits=container_bits(tensor.bits),
        block_size=block_size,
        accuracy_level=accuracy_level,
    )
    model = model_of(node, constants, {"x": x})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, {"x": x})[0])


def test_int8_kernels_take_negative_scales() -> None:
    weight, x = slow.drawn_weight(16, 96), slow.drawn_inputs(5, 96).numpy()
    tensor = rtn(weight, bits=4, group_size=32, symmetric=True, ranges="mse_signed")
    assert int((tensor.scale < 0).sum()) > 10
    want = x @ tensor.dequantize().T.numpy()
    got = matmul_nbits(tensor, 32, x, accuracy_level=4)
    # The kernel rounds x to int8 in blocks: 1 % is more than twice what that costs.
    assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


def test_packed_bits_are_where_the_layout_says() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(2)[None, :20]
    tensor = QuantTensor(
        values=values,
        scale=torch.tensor([[2.0]]),
        zero=torch.tensor([[3]], dtype=torch.int8),
        bits=4,
        group_size=0,
    )
    packed, scales, zeros = pack_nbits(tensor, 16)
    assert packed.shape == (1, 2, 8)
    assert packed[0, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    # What is missing of the second block is its zero point, 3 + 8.
    assert packed[0, 1].tolist() == [0x10, 0x32] + [0xBB] * 6
    assert scales.tolist() == [[2.0, 2.0]]
    assert zeros is not None
    assert zeros.tolist() == [[0xBB]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unpacks_what_was_packed(bits: int, symmetric: bool) -> None:
    tensor = rtn(slow.drawn_weight(5, 72), bits=bits, group_size=16, symmetric=symmetric)
    packed, scales, zeros = pack_nbits(tensor, 16)
    back = unpack_nbits(packed, scales, zeros, bits=bits, columns=72)
    assert torch.equal(back.values, tensor.values)
    assert torch.equal(back.scale, tensor.scale)
    assert (back.bits, back.group_size) == (bits, 16)
    if tensor.zero is None:
        assert back.zero is None
    else:
        assert back.zero is not None
        assert torch.equal(back.zero, tensor.zero)


def test_refuses_blocks_that_cut_groups() -> None:
    tensor = rtn(torch.ones(2, 96), bits=4, group_size=48, symmetric=True)
    with pytest.raises(ValueError, match=r"^blocks of 32 do not divide groups of 48$"):
        pack_nbits(tensor, 32)
    tensor = rtn(torch.ones(2, 96), bits=16, group_size=0, symmetric=True)
    with pytest.raises(ValueError, match=r"^MatMulNBits has at most 8 bits, not 16$"):
        pack_nbits(tensor, 32)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_means_what_dequantize_linear_makes_of_it(
    bits: int, columns: int, group_size: int, unsigned: bool
) -> None:
    weight = slow.drawn_weight(7, columns, seed=bits)
    tensor = rtn(weight, bits=bits, group_size=group_size, symmetric=False)
    assert tensor.zero is not None
    zero = onnx_array(tensor.zero, bits=bits, unsigned=unsigned)
    scale = tensor.scale.numpy()
    constants: dict[str, Any] = {
        "values": proto(onnx_array(tensor.values, bits=bits, unsigned=unsigned), "values"),
        "scale": scale if group_size else scale[:, 0],
        "zero": proto(zero if group_size else zero[:, 0], "zero"),
    }
    options = {"axis": 1, "block_size": group_size} if group_size else {"axis": 0}
    node = helper.make_node("DequantizeLinear", list(constants), ["y"], **options)
    got = ReferenceEvaluator(model_of(node, constants, {})).run(None, {})[0]
    np.testing.assert_array_equal(got, tensor.dequantize().numpy())


def proto(array: np.ndarray, name: str) -> onnx.TensorProto:
    """As it is written to a file: four bits are packed."""
    return ir.to_proto(ir.Tensor(array, name=name))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_that_of_onnx(dtype: torch.dtype) -> None:
    name = str(dtype).rpartition("_")[2]
    kind = {"e4m3fn": TensorProto.FLOAT8E4M3FN, "e5m2": TensorProto.FLOAT8E5M2}[name]
    generator = torch.Generator().manual_seed(0)
    # All sizes from below the smallest subnormal to far above the largest number.
    weight = torch.randn(8, 512, generator=generator) * torch.logspace(-7, 7, 512)
    scale = torch.tensor([[0.37]])
    tensor = to_float8(weight, scale, dtype=dtype)
    constants = {
        "scale": np.float32(0.37),
        "zero": helper.make_tensor("zero", kind, [], [0.0]),
    }
    node = helper.make_node("QuantizeLinear", ["x", *constants], ["y"], saturate=1)
    model = model_of(node, constants, {"x": weight.numpy()}, kind)
    want = ReferenceEvaluator(model).run(None, {"x": weight.numpy()})[0]
    np.testing.assert_array_equal(
        tensor.values.view(torch.uint8).numpy(), np.asarray(want).view(np.uint8)
    )
    numbers = tensor.values.float().numpy()
    assert np.abs(numbers).max() == torch.finfo(dtype).max
    np.testing.assert_array_equal(tensor.dequantize().numpy(), numbers * np.float32(0.37))
    theirs = getattr(ml_dtypes, f"float8_{name}")
    inside = np.abs(weight.numpy() / np.float32(0.37)) <= torch.finfo(dtype).max
    cast = (weight.numpy() / np.float32(0.37)).astype(theirs).astype(np.float32)
    np.testing.assert_array_equal(numbers[inside], cast[inside])


def test_float8_scales_take_rows_to_the_largest_number() -> None:
    weight = slow.drawn_weight(6, 40)
    weight[2] = 0.0
    tensor = to_float8(weight, float8_scales(weight))
    most = tensor.values.float().abs().amax(dim=1)
    assert most.tolist() == [448.0, 448.0, 0.0, 448.0, 448.0, 448.0]
    assert tensor.scale[2].item() == 1.0
    # Three bits of mantissa: half a step of 1/8 on numbers down to the last normal one.
    off = (tensor.dequantize() - weight).abs()
    assert bool((off <= weight.abs() / 16 + tensor.scale * 2**-10).all())
