"""What single inputs of a step graph are filled with, call by call, and inputs that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgevlm_runtime.decode.feeds import (
    CallRows,
    last_row_feed,
    packed_rope_feed,
    picture_rows_feed,
    row_weights_feed,
)
from edgevlm_runtime.decode.groups import Group
from edgevlm_runtime.errors import BundleError
from edgevlm_runtime.manifest import EngineSpec, GraphSpec, RopeSpec, TensorSpec
from edgevlm_runtime.rotary import RotaryTable
from tests.runtime.bundles import embedding_graph, variant_of, write_manifest
from tests.runtime.decoders import TABLE, WEIGHTS, opened, prompt_of
from tests.runtime.onnx_graph import OnnxGraph
from tests.runtime.toy import PLAIN, Array, delta_graph, toy_groups


def call_of(length: int, positions: Sequence[float], picture_rows: Sequence[int] = ()) -> CallRows:
    """Weights of 0 and 1 in turn."""
    return CallRows(
        embeds=np.zeros((len(positions), 4), np.float32),
        positions=np.array(positions, np.float64)[:, None],
        length=length,
        wanted=(0,),
        picture_rows=picture_rows,
        row_weights={"words": np.arange(len(positions), dtype=np.float32) % 2},
    )


def test_what_pads_is_not_weighed() -> None:
    """A call of 9 rows, then one of 7, in arrays for 12 rows and two picture groups."""
    weights, begins, last = np.full((1, 12), 7, np.float32), np.full(2, 7), np.full(1, 7)
    graph = GraphSpec(
        name="picture", role="step", file="", engine=EngineSpec(kind="ort"), inputs=(), outputs=()
    )
    fills = (
        row_weights_feed(weights, "words", graph),
        picture_rows_feed(begins),
        last_row_feed(last),
    )
    for call in (call_of(0, range(9), [1, 5]), call_of(30, range(7), [0, 3])):
        for fill in fills:
            fill(call)
    assert weights.tolist() == [[0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]]
    assert (begins.tolist(), last.tolist()) == ([0, 3], [6])


def test_packed_positions_call_by_call() -> None:
    """One number per row of angle 0.1 a position; 5 of 9 rows reach the group, then all of them."""
    table = RotaryTable(RopeSpec(inv_freq=(0.1,)), 50)
    group = Group(toy_groups(PLAIN, {"main": 50}, "kv_delta")[0])
    cos, sin = np.full((2, 6, 1), 7, np.float32)

    def turned(call: CallRows, dropped: int) -> list[float]:
        """Positions of the rows that were written."""
        packed_rope_feed(cos, sin, table, group, dropped)(call)
        num_rows = len(call.positions) - dropped
        written = [block.writes(num_rows) for block in group.blocks]
        group.commit(written, call.length, len(call.positions), dropped)
        angles: Array = np.arctan2(sin[:num_rows, 0], cos[:num_rows, 0]) / 0.1
        assert (cos[num_rows:] == 7).all()
        cos[...] = sin[...] = 7
        return [round(float(angle), 3) for angle in angles]

    assert turned(call_of(0, [3, 4, 5, 6, 7, 8, 9, 10, 11]), 4) == [3, 4, 5, 6, 7]
    assert turned(call_of(9, [12]), 0) == [8]  # a token
    assert turned(call_of(10, [13, 14, 15]), 0) == [9, 10, 11]  # several
    assert turned(call_of(13, [16, 17, 18, 19, 20]), 2) == [12, 13, 14]  # a second prompt
    assert turned(call_of(18, [21.5]), 0) == [15.5]
    group.rewind(13)
    assert turned(call_of(13, [16, 17]), 0) == [12, 13]
    group.rewind(0)
    assert turned(call_of(0, [3, 4, 5]), 0) == [3, 4, 5]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "rope_cos:main",
            "step graph 'step' wants rope_cos:main, which take a rope in the manifest and each "
            "other\n  hint: compile the bundle again",
        ),
        (
            "question_weights:text",
            "input 'x' of step graph 'step' has source 'question_weights:text'\n"
            "  hint: only graphs that run before the decoder take it; compile the bundle again",
        ),
    ],
)
def test_inputs_that_a_step_graph_cannot_have(tmp_path: Path, source: str, message: str) -> None:
    step = delta_graph(
        OnnxGraph(tmp_path, "step", "step"),
        PLAIN,
        WEIGHTS,
        {"main": 20},
        rows=4,
        num_logits=4,
        phases=("decode",),
    )
    more = TensorSpec(name="x", dtype="float32", shape=(4, 8), source=source)
    graphs = (embedding_graph(tmp_path, TABLE), replace(step, inputs=(*step.inputs, more)))
    variant = variant_of("static", graphs, toy_groups(PLAIN, {"main": 20}, "kv_delta"))
    decoder = opened(write_manifest(tmp_path, {"static": variant}))
    with pytest.raises(BundleError) as error:
        decoder.prefill(prompt_of([1, 2]))
    assert str(error.value) == message
