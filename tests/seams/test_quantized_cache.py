"""Quantized caches from the model to the decoder of a bundle: captured, lowered, written, decoded.

Scales are such that no key or value lies next to a tie (`tests.edgevlm.caches`), so all forms and
all ways to cut a prompt round alike, and their logits differ by the order of float32 sums alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgevlm.model.graphs import ModelGraph, delta_step, inplace_step
from edgevlm.model.plans import delta_state, inplace_state
from edgevlm.model.vlm import Vlm
from edgevlm_export.capture import capture
from edgevlm_export.lower import lower
from edgevlm_export.targets import TARGETS
from edgevlm_export.write import WeightFile, write
from edgevlm_runtime.bundle import Bundle
from edgevlm_runtime.decode.decoder import StepDecoder, open_decoder
from edgevlm_runtime.decode.protocol import Prompt
from edgevlm_runtime.engine import Array, Engines
from edgevlm_runtime.engines.table import EmbeddingTable
from edgevlm_runtime.manifest import GraphSpec
from tests.edgevlm.caches import POSITIONS, cached, rows_of
from tests.edgevlm.tiny import tiny_spec
from tests.runtime.bundles import embedding_graph, variant_of, write_manifest

# Logits of size 1 after two layers in float32.
TOLERANCE = 2e-5
CAPACITY, LENGTH = 48, 40
TOKENS = [index * 7 % 90 for index in range(LENGTH)]
CASES = [
    ("ort", "int8", "channel"),
    ("ort", "int4", "tensor"),
    ("static", "int8", "channel"),
    ("static", "float8_e4m3fn", "tensor"),
]


def made(model: Vlm, target: str) -> list[tuple[ModelGraph, tuple[str, ...], int | None]]:
    """Step graphs with their phases and rows; prompts in place have a graph of their own."""
    if target == "ort":
        phases = ("prefill",), ("decode", "verify")
        return [(inplace_step(model, CAPACITY, serves), serves, None) for serves in phases]
    return [
        (delta_step(model, CAPACITY, rows), ("prefill", "decode", "verify"), rows)
        for rows in (1, 8)
    ]


class Case:
    """A model, and a bundle of its step graphs."""

    def __init__(self, folder: Path, target: str, dtype: str, granularity: str) -> None:
        folder.mkdir()
        self.model = cached(tiny_spec(), dtype, granularity)
        self.table = self.model.embedding.weight.detach().numpy()
        graphs = [embedding_graph(folder, self.table)]
        with WeightFile(folder / "weights.bin") as weights:
            for graph, phases, rows in made(self.model, target):
                file = f"{graph.plan.name}.onnx"
                lowered = lower(capture(graph.module, graph.plan), TARGETS[target])
                write(lowered, folder / file, weights)
                graphs.append(
                    GraphSpec(
                        name=graph.plan.name,
                        role="step",
                        file=file,
                        engine=TARGETS[target].engine,
                        inputs=graph.plan.inputs,
                        outputs=graph.plan.outputs,
                        weights=("weights.bin",),
                        phases=phases,
                        rows=rows,
                        mask="causal" if target == "ort" else "additive",
                    )
                )
        state = inplace_state if target == "ort" else delta_state
        self.state = state(self.model.spec, CAPACITY)
        variant = variant_of(target, tuple(graphs), (self.state,), self.model.spec.decoder.rope)
        self.bundle = Bundle.open(write_manifest(folder, {target: variant}))
        with torch.no_grad():
            self.expected: Array = self.model(rows_of(self.model), POSITIONS)[0].numpy()

    def decoder(self) -> StepDecoder:
        return open_decoder(self.bundle, Engines(self.bundle), EmbeddingTable(self.table))

    def prompt(self, length: int) -> Prompt:
        positions = POSITIONS[:length].numpy()
        return Prompt(
            embeds=self.table[TOKENS[:length]],
            positions=positions,
            next_position=int(positions[-1]) + 1,
        )


@pytest.fixture(scope="module", params=CASES, ids=[" ".join(case) for case in CASES])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("cache") / "bundle", *request.param)


@pytest.mark.parametrize("length", [8, 23])
def test_a_prompt_and_single_tokens_give_the_whole_sequence(case: Case, length: int) -> None:
    """The gap in the positions lies within the prompt: tokens count on from its end."""
    decoder = case.decoder()
    rows = [decoder.prefill(case.prompt(length)).logits[0].copy()]
    rows += [decoder.extend([token]).logits[0].copy() for token in TOKENS[length:]]
    np.testing.assert_allclose(rows, case.expected[length - 1 :], atol=TOLERANCE, rtol=0)


def test_a_prompt_of_one_row(case: Case) -> None:
    logits = case.decoder().prefill(case.prompt(1)).logits
    np.testing.assert_allclose(logits, case.expected[:1], atol=TOLERANCE, rtol=0)


def test_a_call_of_several_tokens_gives_each_its_logits(case: Case) -> None:
    decoder = case.decoder()
    decoder.prefill(case.prompt(20))
    logits = decoder.extend(TOKENS[20:25]).logits
    np.testing.assert_allclose(logits, case.expected[20:25], atol=TOLERANCE, rtol=0)


def test_going_back_and_on_again_is_exact(case: Case) -> None:
    decoder = case.decoder()
    decoder.prefill(case.prompt(20))
    decoder.extend(TOKENS[20:24])
    first = [decoder.extend([token]).logits.copy() for token in TOKENS[24:30]]
    decoder.rewind(22)
    decoder.extend([3, 4, 5, 6, 7])
    decoder.rewind(22)
    decoder.extend(TOKENS[22:24])
    again = [decoder.extend([token]).logits.copy() for token in TOKENS[24:30]]
    np.testing.assert_allclose(again, first, atol=TOLERANCE, rtol=0)
    decoder.rewind(24)
    twice = [decoder.extend([token]).logits.copy() for token in TOKENS[24:30]]
    np.testing.assert_array_equal(twice, again)


def test_a_fork_is_exact_and_independent(case: Case) -> None:
    decoder = case.decoder()
    decoder.prefill(case.prompt(20))
    fork = decoder.fork()
    other = fork.extend([1, 2, 3]).logits.copy()
    one = [decoder.extend([token]).logits.copy() for token in TOKENS[20:24]]
    fork.rewind(20)
    two = [fork.extend([token]).logits.copy() for token in TOKENS[20:24]]
    np.testing.assert_array_equal(one, two)
    assert np.abs(other[0] - one[0]).max() > 100 * TOLERANCE


def test_static_graphs_are_standard_onnx(case: Case) -> None:
    """float8 needs opset 19 for its pairs, which is that of the form."""
    for graph in case.bundle.variant.graphs[1:]:
        path = case.bundle.path / graph.file
        proto = onnx.load(path, load_external_data=False)
        domains = {entry.domain: entry.version for entry in proto.opset_import}
        if case.bundle.variant.target == "static":
            onnx.checker.check_model(str(path), full_check=True)
            assert domains == {"": 19}
        else:
            assert domains["com.microsoft"] == 1
        ops = {node.op_type for node in proto.graph.node}
        assert ("ScatterND" in ops) == (graph.name == "prefill")


def test_buffers_are_those_of_the_plan(case: Case) -> None:
    """Byte by byte: what is allocated is what the manifest says, and what the spec leads to."""
    blocks = [block for group in case.decoder()._groups for block in group.blocks]
    allocated = sum(block.reads().nbytes for block in blocks)
    numbers = len(case.state.tensors) * 2 * CAPACITY * 16
    size = 0.5 if case.state.tensors[0].dtype == "uint8" else 1
    assert allocated == case.state.nbytes == numbers * size
