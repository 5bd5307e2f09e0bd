"""The contract that later work builds on, in one hand-made bundle.

Two step graphs of different weights (one for the prompt, one for tokens), two cache groups of
different capacity and different used length, a convolution's columns, a draft role with state of
its own, a named extra output, and a vision graph that waits for the embedded question: all of it
runs through `Session`, and every number is that of a float64 recurrence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgevlm_runtime import Bundle, EngineError, InputError, Prompt, Session
from edgevlm_runtime.image import ImageLayout
from edgevlm_runtime.manifest import GraphSpec
from edgevlm_runtime.text import TextSpec, encode_prompt, user_message
from tests.runtime.bundles import (
    IMAGE_TOKENS,
    TOKENIZER,
    embedding_graph,
    variant_of,
    vision_weights,
    write_manifest,
)
from tests.runtime.onnx_graph import OnnxGraph
from tests.runtime.toy import (
    WIDTH,
    Array,
    Layer,
    Reference,
    delta_graph,
    toy_groups,
    toy_table,
    toy_weights,
)

# Logits of about 4 after three layers in float32.
TOLERANCE = 2e-5
LAYERS = (
    Layer(kind="attention", name="0", group="early"),
    Layer(kind="conv", name="1", group="columns"),
    Layer(kind="attention", name="2", group="late"),
    Layer(kind="mlp", name="3", group="late"),
)
DRAFT = (Layer(kind="attention", name="d", group="draft"),)
CAPACITIES = {"early": 60, "columns": 60, "late": 50}
CHUNK, DROPPED = 8, 1
TABLE = toy_table()
PROMPT_WEIGHTS = toy_weights(LAYERS, 21)
TOKEN_WEIGHTS = toy_weights(LAYERS, 22)
DRAFT_WEIGHTS = toy_weights(DRAFT, 23)
PICTURES = [
    np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8) for seed in (1, 2)
]


def gate_graph(folder: Path) -> GraphSpec:
    """The mean of the question's rows."""
    graph = OnnxGraph(folder, "gate", "question")
    rows = graph.input("question", "float32", (1, "Q", WIDTH), "question_embeds")
    mean = graph.node("ReduceMean", rows, graph.const(np.array([1])), keepdims=1)
    graph.output(mean, "gate", "float32", (1, 1, WIDTH))
    return graph.finish()


def gated_vision_graph(folder: Path) -> GraphSpec:
    """Rows of a picture, each times the gate."""
    graph = OnnxGraph(folder, "vision", "vision")
    gate = graph.input("gate", "float32", (1, 1, WIDTH), "output:gate")
    pixels = graph.input("pixels", "float32", (1, 3, 8, 8), "pixels")
    strips = graph.node("Reshape", pixels, graph.const(np.array([1, IMAGE_TOKENS, 48])))
    rows = graph.node("MatMul", strips, graph.const(vision_weights()))
    graph.output(graph.node("Mul", rows, gate), "image_embeds", "float32", (1, IMAGE_TOKENS, WIDTH))
    return graph.finish()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("seams")
    prompt = delta_graph(
        OnnxGraph(folder, "prompt", "step"),
        LAYERS,
        PROMPT_WEIGHTS,
        CAPACITIES,
        rows=CHUNK,
        num_logits=1,
        dropped={"late": DROPPED},
        phases=("prefill",),
    )
    tokens = [
        delta_graph(
            OnnxGraph(folder, f"tokens_{rows}", "step"),
            LAYERS,
            TOKEN_WEIGHTS,
            CAPACITIES,
            rows=rows,
            num_logits=rows,
            hidden=True,
            phases=("decode", "verify"),
        )
        for rows in (1, 4)
    ]
    draft = delta_graph(
        OnnxGraph(folder, "draft", "draft"),
        DRAFT,
        DRAFT_WEIGHTS,
        {"draft": 30},
        rows=3,
        num_logits=3,
        extra_input="hidden",
        phases=("decode", "verify", "prefill"),
    )
    # Listed the wrong way round: the order of running follows from what feeds what.
    graphs = (
        gated_vision_graph(folder),
        gate_graph(folder),
        draft,
        *tokens,
        prompt,
        embedding_graph(folder, TABLE),
    )
    state = (
        *toy_groups(LAYERS, CAPACITIES, "kv_delta"),
        *toy_groups(DRAFT, {"draft": 30}, "kv_delta"),
    )
    variant = variant_of("static", graphs, state)
    write_manifest(folder, {"static": variant}, max_new_tokens=9, eos=())
    return Session(Bundle.open(folder))


def reference_prompt(session: Session, words: str, num_images: int) -> Array:
    """The rows of the prompt, by numpy."""
    spec = TextSpec.from_json(session.bundle.manifest.text)
    layouts = [ImageLayout(tokens=(IMAGE_TOKENS,))] * num_images
    encoded = encode_prompt(user_message(words, num_images), layouts, spec, TOKENIZER)
    rows = TABLE[encoded.token_ids].astype(np.float64)
    is_text = np.isin(np.arange(len(rows)), encoded.image_rows, invert=True)
    gate = rows[is_text].mean(0)
    pixels = np.array(PICTURES[:num_images]) / 255
    strips = pixels.transpose(0, 3, 1, 2).reshape(num_images * IMAGE_TOKENS, 48)
    rows[encoded.image_rows] = strips @ vision_weights() * gate
    return rows


def reference_prefill(rows: Array) -> tuple[Reference, Array]:
    """The recurrence after the prompt, and the logits of its last row."""
    reference = Reference(layers=LAYERS)
    logits = np.empty(0)
    for begin in range(0, len(rows), CHUNK):
        chunk = rows[begin : begin + CHUNK]
        places = np.arange(begin, begin + len(chunk))
        logits, _ = reference.call(PROMPT_WEIGHTS, chunk, places, {"late": DROPPED})
    return reference, logits[-1]


@pytest.mark.parametrize("num_images", [1, 2])
def test_an_answer_is_that_of_the_recurrence(session: Session, num_images: int) -> None:
    words = "what is it?"
    rows = reference_prompt(session, words, num_images)
    reference, logits = reference_prefill(rows)
    wanted = []
    for index in range(9):
        token = int(logits.argmax())
        # The choice is clear, so that float32 makes the same.
        assert np.diff(np.sort(logits)[-2:])[0] > 10 * TOLERANCE
        wanted.append(token)
        logits = reference.call(TOKEN_WEIGHTS, TABLE[[token]], np.array([len(rows) + index]))[0][0]
    completion = session.generate(words, PICTURES[:num_images])
    assert completion.tokens == tuple(wanted)
    assert completion.finish_reason == "length"


def test_logits_and_extras_through_the_decoder(session: Session) -> None:
    prompt = session.encode("where is the cat now?", PICTURES)
    rows = reference_prompt(session, "where is the cat now?", 2)
    np.testing.assert_allclose(prompt.embeds, rows, atol=TOLERANCE, rtol=0)
    reference, logits = reference_prefill(rows)
    decoder = session.open_decoder()
    step = decoder.prefill(prompt)
    np.testing.assert_allclose(step.logits[0], logits, atol=TOLERANCE, rtol=0)

    tokens = [5, 6, 7, 8]
    places = np.arange(len(rows), len(rows) + 4)
    wanted, hidden = reference.call(TOKEN_WEIGHTS, TABLE[tokens], places)
    step = decoder.extend(tokens[:3])  # a graph of four rows, one of padding
    assert step.extras["hidden"].shape == (1, 3, WIDTH)
    np.testing.assert_allclose(step.logits, wanted[:3], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(step.extras["hidden"][0], hidden[:3], atol=TOLERANCE, rtol=0)
    decoder.rewind(len(rows) + 1)
    step = decoder.extend(tokens[1:])
    np.testing.assert_allclose(step.logits, wanted[1:], atol=TOLERANCE, rtol=0)


def test_groups_have_their_own_length(session: Session) -> None:
    """The late group got all but one row of every piece of the prompt, and may be smaller."""
    decoder = session.open_decoder()
    prompt = session.encode("what is in the picture? a cat", PICTURES)
    num_rows = len(prompt.embeds)
    decoder.prefill(prompt)
    pieces = -(-num_rows // CHUNK)
    late_left = CAPACITIES["late"] - (num_rows - DROPPED * pieces)
    early_left = CAPACITIES["early"] - num_rows
    assert decoder.capacity - num_rows == min(early_left, late_left)
    with pytest.raises(EngineError) as error:
        decoder.rewind(num_rows - 1)
    begin = num_rows - (num_rows - 1) % CHUNK - 1
    assert str(error.value) == (
        f"group 'late' cannot go back to row {num_rows - 1}: the call of rows {begin} to "
        f"{num_rows - 1} has dropped some\n  hint: rewind to {begin} or less"
    )
    assert decoder.length == num_rows


def test_a_call_must_leave_rows(session: Session) -> None:
    prompt = session.encode("what is it?", PICTURES)
    short = Prompt(embeds=prompt.embeds[:1], positions=np.arange(1), next_position=1)
    with pytest.raises(InputError) as error:
        session.open_decoder().prefill(short)
    assert str(error.value) == (
        "graph 'prompt' drops 1 of the rows of every call, got a piece of 1\n"
        "  hint: lengthen the prompt, or compile with another size of pieces"
    )


def test_a_draft_runs_on_hidden_rows(session: Session) -> None:
    """Its input is the extra output of the step graph, row by row; its state is its own."""
    target, draft = session.open_decoder(), session.open_decoder("draft")
    target.prefill(session.encode("what is it?", PICTURES[:1]))
    tokens = [9, 10, 11, 12]
    hidden = target.extend(tokens).extras["hidden"].copy()
    reference = Reference(layers=DRAFT)
    wanted, _ = reference.call(DRAFT_WEIGHTS, TABLE[tokens] + hidden[0], np.arange(4))
    step = draft.extend(tokens, values={"hidden": hidden})  # two calls: three rows and one
    np.testing.assert_allclose(step.logits, wanted, atol=TOLERANCE, rtol=0)
    assert (target.length, draft.length) == (target.length, 4)
    with pytest.raises(EngineError) as error:
        draft.extend([1])
    assert str(error.value) == (
        "graph 'draft' wants output 'hidden', which nothing gave\n"
        "  hint: pass it with the prompt or the tokens, as values={...}"
    )


def test_graphs_that_an_answer_does_not_need_stay_closed(session: Session) -> None:
    fresh = Session(session.bundle)
    assert fresh.engines.names == ("gate", "vision", "prompt", "tokens_1")
    fresh.load()
    assert set(fresh.engines.names) == {"gate", "vision", "prompt", "tokens_1", "tokens_4", "draft"}
