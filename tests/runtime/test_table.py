"""Embedding tables of 4 and 8 bits: their numbers, bytes that a head shares, and answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from edgevlm_runtime import Bundle, InputError, Session
from edgevlm_runtime.decode.decoder import open_decoder
from edgevlm_runtime.engine import Engines
from edgevlm_runtime.engines.table import EmbeddingTable, QuantizedTable, open_table
from tests.runtime.decoders import TOKENS, prompt_of
from tests.runtime.tables import packed, quantized_bundle
from tests.runtime.toy import VOCAB

CASES = [(4, 32, 64), (4, 16, 40), (4, 32, 33), (8, 32, 64), (8, 16, 7), (8, 128, 60)]
"""Bits, block and width: whole blocks, part of a block, one number in the last one."""


@pytest.mark.parametrize(("bits", "block", "width"), CASES)
def test_rows_are_their_numbers(bits: int, block: int, width: int) -> None:
    codes, scales, values = packed(bits, block, width)
    table = QuantizedTable(codes, scales, bits=bits, width=width)
    assert table.vocab_size == 50
    ids = [3, 49, 0, 3]
    rows = table.rows(ids)
    assert (rows.dtype, rows.shape) == (np.float32, (4, width))
    # One product in float32 of a whole number and a scale.
    np.testing.assert_allclose(rows, values[ids], rtol=1e-6, atol=0)
    for token in ids:
        row = table.row(token)
        assert (row.dtype, row.shape) == (np.float32, (1, width))
        np.testing.assert_array_equal(row[0], table.rows([token])[0])
    rows[...] = 0  # a copy, into which pictures may be written
    np.testing.assert_allclose(table.row(3)[0], values[3], rtol=1e-6, atol=0)
    for call in (table.row, lambda token: table.rows([1, token])):
        for token in (-1, 50):
            with pytest.raises(InputError) as error:
                call(token)
            assert str(error.value) == f"token {token} is not one of the 50 of the embedding"


@pytest.mark.parametrize(("bits", "block", "width"), CASES)
def test_a_head_reads_the_same_bytes(bits: int, block: int, width: int) -> None:
    """What MatMulNBits multiplies with, asked for by products with unit vectors."""
    codes, scales, _ = packed(bits, block, width)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=width,
        N=50,
        bits=bits,
        block_size=block,
        accuracy_level=0,
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "head",
        [value("x", 1, [width, width])],
        [value("y", 1, [width, 50])],
        [
            helper.make_tensor("codes", 2, codes.shape, codes.tobytes(), raw=True),
            helper.make_tensor("scales", 1, scales.shape, scales.tobytes(), raw=True),
        ],
    )
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (columns,) = session.run(None, {"x": np.eye(width, dtype=np.float32)})
    rows = QuantizedTable(codes, scales, bits=bits, width=width).rows(np.arange(50))
    np.testing.assert_allclose(columns.T, rows, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bundle_answers_with_it(tmp_path: Path, bits: int) -> None:
    """Its decoder is that of a plain table of the same numbers."""
    folder, values = quantized_bundle(tmp_path / "bundle", bits)
    bundle = Bundle.open(folder)
    table = open_table(bundle, bundle.variant.graphs[0])
    np.testing.assert_allclose(table.rows(np.arange(VOCAB)), values, rtol=1e-6, atol=0)
    plain = EmbeddingTable(table.rows(np.arange(VOCAB)))
    decoders = [open_decoder(bundle, Engines(bundle), each) for each in (table, plain)]
    for decoder in decoders:
        decoder.prefill(prompt_of(TOKENS[:9]))
    for token in TOKENS[9:14]:
        one, two = (decoder.extend([token]).logits for decoder in decoders)
        np.testing.assert_array_equal(one, two)
    one, two = (decoder.extend(TOKENS[14:18]).logits for decoder in decoders)
    np.testing.assert_array_equal(one, two)
    assert len(Session(bundle).generate("what is it?").tokens) == 5
