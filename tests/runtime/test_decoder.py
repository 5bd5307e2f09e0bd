"""Decoders of both forms give the logits of a plain float64 recurrence, whatever the calls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgevlm_runtime.decode.protocol import Cancelled
from edgevlm_runtime.errors import EngineError
from edgevlm_runtime.manifest import RopeSpec
from tests.runtime.bundles import embedding_graph, variant_of, write_manifest, write_toy
from tests.runtime.decoders import FORMS, TABLE, TOKENS, WEIGHTS, close, expected, opened, prompt_of
from tests.runtime.onnx_graph import OnnxGraph
from tests.runtime.toy import (
    HEAD_DIM,
    PLAIN,
    Array,
    Layer,
    Reference,
    delta_graph,
    toy_groups,
    toy_weights,
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 3, 12, 13, 16, 17, 30])
def test_prefill_in_chunks_then_single_tokens(toy: Path, form: str, length: int) -> None:
    decoder = opened(toy, form)
    wanted = expected(TOKENS)
    close(decoder.prefill(prompt_of(TOKENS[:length])).logits, wanted[length - 1 : length])
    for index in range(length, 40):
        close(decoder.extend([TOKENS[index]]).logits, wanted[index : index + 1])
    assert decoder.length == 40


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 11, 20])
def test_several_tokens_give_logits_of_every_row(toy: Path, form: str, size: int) -> None:
    decoder = opened(toy, form)
    wanted = expected(TOKENS)
    decoder.prefill(prompt_of(TOKENS[:7]))
    close(decoder.extend(TOKENS[7 : 7 + size]).logits, wanted[7 : 7 + size])
    close(decoder.extend([TOKENS[7 + size]]).logits, wanted[7 + size : 8 + size])


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_some_rows(toy: Path, form: str) -> None:
    decoder = opened(toy, form)
    wanted = expected(TOKENS)
    decoder.prefill(prompt_of(TOKENS[:7]))
    close(decoder.extend(TOKENS[7:13], rows=[1, 5]).logits, wanted[[8, 12]])
    close(decoder.extend(TOKENS[13:30], rows=[16]).logits, wanted[[29]])


@pytest.mark.parametrize("form", FORMS)
def test_rewind_forgets(toy: Path, form: str) -> None:
    decoder = opened(toy, form)
    wanted = expected(TOKENS)
    decoder.prefill(prompt_of(TOKENS[:9]))
    decoder.extend([301, 302, 303, 304, 305])
    decoder.rewind(11)
    decoder.rewind(9)
    close(decoder.extend(TOKENS[9:12]).logits, wanted[9:12])
    decoder.rewind(4)
    close(decoder.extend(TOKENS[4:6]).logits, wanted[4:6])
    decoder.rewind(0)
    close(decoder.prefill(prompt_of(TOKENS[:20])).logits, wanted[19:20])


@pytest.mark.parametrize("form", FORMS)
def test_forks_are_independent(toy: Path, form: str) -> None:
    decoder = opened(toy, form)
    wanted = expected(TOKENS)
    decoder.prefill(prompt_of(TOKENS[:9]))
    fork = decoder.fork()
    other = [*TOKENS[:9], 5, 6, 7]
    close(fork.extend(other[9:]).logits, expected(other)[9:])
    close(decoder.extend(TOKENS[9:13]).logits, wanted[9:13])
    assert (fork.length, decoder.length) == (12, 13)


@pytest.mark.parametrize("form", FORMS)
def test_positions_are_not_the_length(toy: Path, form: str) -> None:
    """Gaps, fractions, and a next position that does not follow from the last row."""
    positions = np.array([0, 1, 2.25, 2.5, 2.75, 9, 10, 30])
    wanted = expected(TOKENS[:10], np.array([*positions, 40.5, 41.5]))
    decoder = opened(toy, form)
    step = decoder.prefill(prompt_of(TOKENS[:8], positions, 40.5))
    close(step.logits, wanted[7:8])
    close(decoder.extend([TOKENS[8]]).logits, wanted[8:9])
    decoder.rewind(8)
    close(decoder.extend(TOKENS[8:10]).logits, wanted[8:10])
    decoder.rewind(5)
    again = expected(TOKENS[:6], np.array([*positions[:6]]))
    close(decoder.extend([TOKENS[5]]).logits, again[5:6])


@pytest.mark.parametrize("form", FORMS)
def test_wanted_rows_are_read_at_every_call(toy: Path, form: str) -> None:
    """A list that the caller changes and gives again."""
    decoder = opened(toy, form)
    wanted = expected(TOKENS)
    decoder.prefill(prompt_of(TOKENS[:7]))
    rows = [2]
    close(decoder.extend(TOKENS[7:10], rows=rows).logits, wanted[[9]])
    rows[0] = 0
    close(decoder.extend(TOKENS[10:13], rows=rows).logits, wanted[[10]])


def test_prefill_looks_at_the_flag_between_chunks(toy: Path) -> None:
    decoder = opened(toy, "ort")  # 12 rows a call
    asked = []

    def cancelled() -> bool:
        asked.append(decoder.length)
        return decoder.length >= 24

    with pytest.raises(Cancelled):
        decoder.prefill(prompt_of(TOKENS), cancelled=cancelled)
    assert asked == [12, 24]
    # What was consumed is there, and tokens go on behind it.
    close(decoder.extend(TOKENS[24:26]).logits, expected(TOKENS[:26])[24:])
    decoder.rewind(0)
    close(decoder.prefill(prompt_of(TOKENS[:5])).logits, expected(TOKENS[:5])[4:])


def test_three_positions_per_row(tmp_path: Path) -> None:
    """M-RoPE: frequencies turn with the temporal, height or width position."""
    rope = RopeSpec(
        inv_freq=tuple(0.7**i for i in range(HEAD_DIM // 2)),
        sections=(2, 3, 3),
        attention_scaling=1.0,
    )
    step = delta_graph(
        OnnxGraph(tmp_path, "step", "step"),
        PLAIN,
        WEIGHTS,
        {"main": 20},
        rows=4,
        num_logits=4,
        phases=("decode",),
    )
    variant = variant_of(
        "static",
        (embedding_graph(tmp_path, TABLE), step),
        toy_groups(PLAIN, {"main": 20}, "kv_delta"),
        rope,
    )
    decoder = opened(write_manifest(tmp_path, {"static": variant}))
    positions = np.array([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])
    step_logits = decoder.prefill(prompt_of(TOKENS[:6], positions, 4)).logits
    reference = Reference(layers=PLAIN, rope=rope)
    wanted, _ = reference.call(WEIGHTS, TABLE[TOKENS[:6]], positions.T)
    close(step_logits, wanted[5:])
    after, _ = reference.call(WEIGHTS, TABLE[TOKENS[6:8]], np.array([[4, 4, 4], [5, 5, 5]]))
    close(decoder.extend(TOKENS[6:8]).logits, after)


@pytest.mark.parametrize("rows", [(1, 3), (1, 9)])
def test_a_window_forgets_what_lies_behind_it(tmp_path: Path, rows: tuple[int, ...]) -> None:
    """A ring of 6 slots; calls of up to 9 rows, longer than the ring."""
    layers = PLAIN[:2]
    graphs = [
        delta_graph(
            OnnxGraph(tmp_path, f"step_{count}", "step"),
            layers,
            WEIGHTS,
            {"main": 6},
            rows=count,
            num_logits=count,
            phases=("decode", "verify", "prefill"),
        )
        for count in rows
    ]
    variant = variant_of(
        "static",
        (embedding_graph(tmp_path, TABLE), *graphs),
        toy_groups(layers, {"main": 6}, "kv_window"),
    )
    decoder = opened(write_manifest(tmp_path, {"static": variant}))

    def wanted(index: int) -> Array:
        """One layer of attention sees the last 6 rows and nothing else."""
        seen = range(max(0, index - 5), index + 1)
        embeds = TABLE[[TOKENS[row] for row in seen]]
        return Reference(layers=layers).call(WEIGHTS, embeds, np.array(seen))[0][-1]

    close(decoder.prefill(prompt_of(TOKENS[:10])).logits[0], wanted(9))
    for index in range(10, 14):
        close(decoder.extend([TOKENS[index]]).logits[0], wanted(index))
    size = min(rows[1], 5)
    decoder.extend([300] * size)
    decoder.rewind(15)
    decoder.rewind(14)
    got = decoder.extend(TOKENS[14 : 14 + size]).logits
    close(got, np.array([wanted(14 + row) for row in range(size)]))
    with pytest.raises(EngineError) as error:
        decoder.rewind(5)
    assert str(error.value) == (
        "state 'key.0' of kind 'kv_window' cannot go back to row 5\n"
        "  hint: rewind within the last call, or to 0 and prefill again"
    )
    decoder.rewind(0)
    close(decoder.prefill(prompt_of(TOKENS[:3])).logits[0], wanted(2))


def test_convolution_columns_are_cropped(tmp_path: Path) -> None:
    """Conv state follows padding, rewinds inside the last call, and forks."""
    layers = (Layer(kind="attention", name="0"), Layer(kind="conv", name="1"))
    weights = toy_weights(layers, 4)
    graphs = [
        delta_graph(
            OnnxGraph(tmp_path, f"step_{rows}", "step"),
            layers,
            weights,
            {"main": 30},
            rows=rows,
            num_logits=rows,
            phases=("decode", "verify", "prefill"),
        )
        for rows in (1, 6)
    ]
    variant = variant_of(
        "static",
        (embedding_graph(tmp_path, TABLE), *graphs),
        toy_groups(layers, {"main": 30}, "kv_delta"),
    )
    decoder = opened(write_manifest(tmp_path, {"static": variant}))
    wanted, _ = Reference(layers=layers).call(weights, TABLE[TOKENS[:20]], np.arange(20))
    decoder.prefill(prompt_of(TOKENS[:8]))
    decoder.extend([TOKENS[8], TOKENS[9], 300, 301])
    decoder.rewind(10)
    fork = decoder.fork()
    close(decoder.extend(TOKENS[10:15]).logits, wanted[10:15])
    close(fork.extend(TOKENS[10:12]).logits, wanted[10:12])
    fork.rewind(11)
    second = fork.fork()
    second.rewind(10)  # the fork of a decoder remembers its last call
    close(second.extend(TOKENS[10:13]).logits, wanted[10:13])
    close(fork.extend([TOKENS[11]]).logits, wanted[11:12])
    decoder.rewind(10)
    close(decoder.extend([TOKENS[10]]).logits, wanted[10:11])
    with pytest.raises(EngineError) as error:
        decoder.rewind(9)
    assert str(error.value) == (
        "state 'conv.1' of kind 'conv' cannot go back to row 9\n"
        "  hint: rewind within the last call, or to 0 and prefill again"
    )
    assert decoder.length == 11
    decoder.rewind(0)
    close(decoder.prefill(prompt_of(TOKENS[:8])).logits, wanted[7:8])
