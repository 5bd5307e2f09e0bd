"""State kinds that the decoder tests do not reach, recurrent and constant; and rotary rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode.decoder import StepDecoder, open_decoder
from edgevlm_runtime.decode.protocol import Prompt
from edgevlm_runtime.engine import Engines
from edgevlm_runtime.engines.table import EmbeddingTable
from edgevlm_runtime.errors import BundleError, EngineError
from edgevlm_runtime.manifest import RopeSpec, StateGroup, StateTensor
from edgevlm_runtime.rotary import RotaryTable
from tests.runtime.bundles import embedding_graph, variant_of, write_manifest
from tests.runtime.onnx_graph import OnnxGraph
from tests.runtime.toy import VOCAB, WIDTH, Array, toy_table

# Sums of a few float32 products.
TOLERANCE = 2e-5
DECAY = 0.75
TABLE = toy_table()
HEAD = (np.random.default_rng(2).standard_normal((WIDTH, VOCAB)) / WIDTH**0.5).astype(np.float32)
MEMORY = np.random.default_rng(3).standard_normal((1, 5, WIDTH)).astype(np.float32)


def recurrent_state() -> StateGroup:
    running = StateTensor(
        name="running",
        kind="ssm",
        input="running",
        output="running_out",
        dtype="float32",
        shape=(1, WIDTH),
        axis=1,
    )
    memory = StateTensor(
        name="memory",
        kind="const",
        input="memory",
        output="scene",
        dtype="float32",
        shape=(1, 5, WIDTH),
        axis=1,
    )
    return StateGroup(name="main", capacity=50, tensors=(running, memory))


def recurrent_bundle(folder: Path) -> Path:
    """Graphs of 1 and 3 rows: a decaying sum over valid rows, plus the mean of a memory."""
    graphs = []
    for rows in (1, 3):
        graph = OnnxGraph(folder, f"step_{rows}", "step")
        x = graph.input("inputs_embeds", "float32", (1, rows, WIDTH), "embeds")
        valid = graph.input("row_valid", "float32", (1, rows, 1), "row_valid")
        wanted = graph.input("logit_rows", "int64", (rows,), "logit_rows")
        used = graph.input("used", "int64", (1,), "used:main")
        state = graph.input("running", "float32", (1, WIDTH), "state:running")
        memory = graph.input("memory", "float32", (1, 5, WIDTH), "state:memory")
        scale = graph.input("scale", "float32", (WIDTH,), "constant:scale.npy")
        axis = graph.const(np.array([1]))
        seen = []
        for row in range(rows):
            here = graph.node("Squeeze", graph.slice(x, 1, row, row + 1), axis)
            flag = graph.node("Squeeze", graph.slice(valid, 1, row, row + 1), axis)
            # A row of padding leaves the state as it is.
            step = graph.node("Mul", flag, graph.const(np.array(DECAY - 1, np.float32)))
            keep = graph.node("Add", step, graph.const(np.array(1, np.float32)))
            state = graph.node("Add", graph.node("Mul", state, keep), graph.node("Mul", here, flag))
            seen.append(graph.node("Unsqueeze", state, axis))
        graph.output(state, "running_out", "float32", (1, WIDTH))
        y = graph.node("Concat", *seen, axis=1)
        y = graph.node("Add", y, graph.node("ReduceMean", memory, axis, keepdims=1))
        y = graph.node("Mul", y, scale)
        start = graph.node("Cast", used, to=1)
        y = graph.node("Add", graph.node("Gather", y, wanted, axis=1), start)
        graph.output(
            graph.node("MatMul", y, graph.const(HEAD)), "logits", "float32", (1, rows, VOCAB)
        )
        graphs.append(graph.finish(rows=rows, phases=("prefill", "decode", "verify")))
    np.save(folder / "scale.npy", np.full(WIDTH, 2, np.float32))
    variant = variant_of(
        "static", (embedding_graph(folder, TABLE), *graphs), (recurrent_state(),), None
    )
    return write_manifest(folder, {"static": variant})


def opened(path: Path) -> StepDecoder:
    bundle = Bundle.open(path)
    return open_decoder(bundle, Engines(bundle), EmbeddingTable(TABLE))


def prompt_of(tokens: list[int]) -> Prompt:
    return Prompt(
        embeds=TABLE[tokens],
        positions=np.arange(len(tokens)),
        next_position=len(tokens),
        values={"scene": MEMORY},
    )


def expected(calls: list[list[int]]) -> Array:
    """Logits of every row; a row also knows how many came before its call."""
    state, result, used = np.zeros(WIDTH), [], 0
    for tokens in calls:
        for token in tokens:
            state = DECAY * state + TABLE[token]
            result.append((2 * (state + MEMORY[0].mean(0)) + used) @ HEAD)
        used += len(tokens)
    return np.array(result)


def test_recurrent_state_takes_turns(tmp_path: Path) -> None:
    decoder = opened(recurrent_bundle(tmp_path))
    prompt, one, two = [1, 2, 3, 4, 5], [6], [7, 8]  # calls of 3 and 2 rows, the last padded
    calls = [prompt[:3], prompt[3:], one, two]
    wanted = expected(calls)
    logits = decoder.prefill(prompt_of(prompt)).logits
    np.testing.assert_allclose(logits, wanted[4:5], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(decoder.extend(one).logits, wanted[5:6], atol=TOLERANCE, rtol=0)
    decoder.extend([300, 301, 302])
    decoder.rewind(6)
    fork = decoder.fork()
    for either in (decoder, fork):
        np.testing.assert_allclose(either.extend(two).logits, wanted[6:], atol=TOLERANCE, rtol=0)
    with pytest.raises(EngineError) as error:
        decoder.rewind(7)
    assert str(error.value) == (
        "state 'running' of kind 'ssm' cannot go back to row 7\n"
        "  hint: rewind within the last call, or to 0 and prefill again"
    )
    decoder.rewind(6)
    decoder.rewind(0)
    logits = decoder.prefill(prompt_of(prompt)).logits
    np.testing.assert_allclose(logits, wanted[4:5], atol=TOLERANCE, rtol=0)


def test_a_memory_of_the_wrong_shape(tmp_path: Path) -> None:
    decoder = opened(recurrent_bundle(tmp_path))
    prompt = Prompt(
        embeds=TABLE[[1]],
        positions=np.arange(1),
        next_position=1,
        values={"scene": MEMORY[:, :4]},
    )
    with pytest.raises(EngineError) as error:
        decoder.prefill(prompt)
    assert str(error.value) == (
        "state 'memory' has shape [1, 5, 32], output 'scene' gave [1, 4, 32]\n"
        "  hint: compile the bundle again"
    )


def test_windows_want_a_group_of_their_own(tmp_path: Path) -> None:
    from edgevlm_runtime.decode.groups import Group

    tensors = tuple(
        StateTensor(
            name=kind, kind=kind, input=kind, output=kind, dtype="float32", shape=(1, 1, 4, 2)
        )
        for kind in ("kv_window", "kv_delta")
    )
    with pytest.raises(BundleError) as error:
        Group(StateGroup(name="main", capacity=4, tensors=tensors))
    assert str(error.value) == (
        "state group 'main' mixes 'kv_window' with ['kv_delta']\n"
        "  hint: compile the bundle again, with windows in a group of their own"
    )


@pytest.mark.parametrize("sections", [(), (1, 2, 1)])
def test_rotary_rows(sections: tuple[int, ...]) -> None:
    """Whole and broken positions, one row and several, inside and past the table."""
    inv_freq = (1.0, 0.3, 0.1, 0.02)
    spec = RopeSpec(inv_freq=inv_freq, sections=sections, attention_scaling=1.25)
    table = RotaryTable(spec, 10)
    axes = len(sections) or 1
    cases = [[[3]], [[3.5]], [[12]], [[0], [1], [2.25]], [[9], [10]]]
    if sections:
        cases = [[list(row) * axes for row in case] for case in cases]
        cases += [[[1, 2, 3]], [[4, 4, 9], [5, 5, 5]]]
    for case in cases:
        positions = np.array(case, np.float64)
        cos, sin = np.full((2, 5, 4), 7.0, np.float32)
        table.fill(positions, cos, sin)
        turning = np.repeat(positions, sections or 4, axis=1)
        angles = turning * np.array(inv_freq)
        # Angles up to 12 in float32.
        np.testing.assert_allclose(cos[: len(case)], 1.25 * np.cos(angles), atol=3e-6, rtol=0)
        np.testing.assert_allclose(sin[: len(case)], 1.25 * np.sin(angles), atol=3e-6, rtol=0)
        assert (cos[len(case) :] == 7).all()
