"""Sessions over graphs that reduce visual rows, and over graphs that say where these stand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm_runtime import Bundle, BundleError, InputError, Session
from tests.runtime.bundles import (
    IMAGE_SIZE,
    IMAGE_TOKENS,
    TOKENIZER,
    embedding_graph,
    variant_of,
    vision_weights,
    write_manifest,
)
from tests.runtime.decoders import TABLE, WEIGHTS
from tests.runtime.onnx_graph import OnnxGraph
from tests.runtime.pictures import FORMS, Recurrence, write_bundle
from tests.runtime.toy import PLAIN, ROPE, WIDTH, Array, delta_graph, toy_groups

PICTURES = [
    np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8) for seed in (3, 4, 5)
]
QUESTION = "is it?"
WORDS = len(TOKENIZER.encode(QUESTION).ids)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    folder = tmp_path_factory.mktemp("pictures")
    fields = {"packed": ("late",), "eos": (), "max_new_tokens": 9}
    return {
        form: Session(Bundle.open(write_bundle(folder / form, form, **fields)))  # type: ignore[arg-type]
        for form in FORMS
    }


@pytest.mark.parametrize("pictures", [0, 1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens_are_those_of_the_recurrence(
    sessions: dict[str, Session], form: str, pictures: int
) -> None:
    session = sessions[form]
    prompt = session.encode(QUESTION, PICTURES[:pictures])
    assert prompt.picture_rows.tolist() == [1 + IMAGE_TOKENS * i for i in range(pictures)]
    recurrence = Recurrence(packed=("late",))
    logits, wanted = recurrence.prefill(prompt)[0], []
    for _ in range(9):
        # The choice is clear, so that float32 makes the same.
        assert np.diff(np.sort(logits)[-2:])[0] > 1e-4
        wanted.append(int(logits.argmax()))
        logits = recurrence.extend(wanted[-1:])[0]
    assert session.generate(QUESTION, PICTURES[:pictures]).tokens == tuple(wanted)


@pytest.mark.parametrize(
    ("form", "names"),
    [("ort", ("vision", "step", "picture")), ("static", ("vision", "step_4", "step_1"))],
)
def test_graphs_that_most_answers_need_are_loaded(
    sessions: dict[str, Session], form: str, names: tuple[str, ...]
) -> None:
    fresh = Session(sessions[form].bundle)
    assert fresh.engines.names == (names if form == "ort" else (*names, "picture_1_24"))


def test_a_prompt_that_no_graph_takes_is_refused_before_any_picture_is_seen(
    sessions: dict[str, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = sessions["static"]
    monkeypatch.setattr(session, "_encoder", None)
    with pytest.raises(InputError) as error:
        session.generate(QUESTION, PICTURES)
    assert str(error.value) == (
        f"prompt has {2 + 3 * IMAGE_TOKENS + WORDS} tokens with 3 pictures or tiles, the bundle "
        "takes up to 16 with 1, up to 24 with 1, up to 30 with 2\n"
        "  hint: shorten the prompt, or compile for more rows or pictures"
    )


def strips_of(picture: Array) -> Array:
    """What the toy vision graphs make of a picture before anything else."""
    pixels = picture.transpose(2, 0, 1).reshape(IMAGE_TOKENS, 48) / 255
    return pixels @ vision_weights()


def seeing_session(
    folder: Path, vision: OnnxGraph, *more: Any, axes: int = 1, **fields: Any
) -> Session:
    """A session over a vision graph in the making, which has its pixels and its other outputs."""
    strips = vision.node("Reshape", "pixels", vision.const(np.array([1, IMAGE_TOKENS, 48])))
    rows = vision.node("MatMul", strips, vision.const(vision_weights()))
    if more:
        rows = vision.node("Mul", rows, vision.input("asked", "float32", (1, 1, WIDTH), "output:a"))
    vision.output(rows, "image_embeds", "float32", (1, IMAGE_TOKENS, WIDTH))
    step = delta_graph(
        OnnxGraph(folder, "step", "step"),
        PLAIN,
        WEIGHTS,
        {"main": 50},
        rows=1,
        num_logits=1,
        phases=("decode",),
    )
    graphs = (embedding_graph(folder, TABLE), *more, vision.finish(), step)
    rope = replace(ROPE, sections=(len(ROPE.inv_freq) // axes,) * axes if axes > 1 else ())
    groups = toy_groups(PLAIN, {"main": 50}, "kv_delta")
    variant = variant_of("static", graphs, groups, rope)
    return Session(Bundle.open(write_manifest(folder, {"static": variant}, **fields)))


def vision_of(folder: Path) -> OnnxGraph:
    graph = OnnxGraph(folder, "vision", "vision")
    graph.input("pixels", "float32", (1, 3, IMAGE_SIZE, IMAGE_SIZE), "pixels")
    return graph


def placing_vision(folder: Path, axes: int = 1) -> OnnxGraph:
    """Token i stands at i times the mean pixel."""
    vision = vision_of(folder)
    mean = vision.node("ReduceMean", "pixels", vision.const(np.array([1, 2, 3])), keepdims=0)
    steps = np.repeat(np.arange(IMAGE_TOKENS, dtype=np.float32)[None, :, None], axes, axis=2)
    places = vision.node("Mul", mean, vision.const(steps))
    vision.output(places, "image_positions", "float32", (1, IMAGE_TOKENS, axes))
    return vision


def test_a_graph_says_where_visual_tokens_stand(tmp_path: Path) -> None:
    image = {"offsets": [[[9], [9], [9], [9]]], "spans": [2.5]}
    session = seeing_session(tmp_path, placing_vision(tmp_path), image=image)
    prompt = session.encode(QUESTION, PICTURES[:2])
    first, second = (np.arange(4) * picture.mean() / 255 for picture in PICTURES[:2])
    wanted = [0, *(1 + first), *(3.5 + second), *(6 + np.arange(WORDS + 1))]
    # Products of float32.
    np.testing.assert_allclose(prompt.positions, wanted, atol=1e-6, rtol=0)
    assert prompt.next_position == 6 + WORDS + 1
    assert list(prompt.values) == ["image_embeds"]  # and so no input of a step graph
    np.testing.assert_allclose(prompt.embeds[1:5], strips_of(PICTURES[0]), atol=1e-6, rtol=0)
    assert session.encode(QUESTION).positions.tolist() == list(range(WORDS + 2))


def test_a_graph_says_several_places_of_a_token(tmp_path: Path) -> None:
    """As many as the rotary embedding has axes; text has one place on all of them."""
    session = seeing_session(
        tmp_path, placing_vision(tmp_path, axes=2), axes=2, image={"spans": [2.5]}
    )
    prompt = session.encode(QUESTION, PICTURES[:2])
    first, second = (np.arange(4) * picture.mean() / 255 for picture in PICTURES[:2])
    wanted = [0, *(1 + first), *(3.5 + second), *(6 + np.arange(WORDS + 1))]
    # Products of float32.
    np.testing.assert_allclose(prompt.positions, [wanted] * 2, atol=1e-6, rtol=0)
    assert prompt.next_position == 6 + WORDS + 1
    alone = session.encode(QUESTION)
    assert alone.positions.tolist() == [list(range(WORDS + 2))] * 2
    session.decoder.prefill(alone)
    assert session.decoder.extend([3]).logits.shape == (1, 400)


def test_places_without_spans(tmp_path: Path) -> None:
    """A picture moves the position on by its tokens."""
    session = seeing_session(tmp_path, placing_vision(tmp_path))
    assert session.encode(QUESTION, PICTURES[:2]).next_position == 2 + 2 * IMAGE_TOKENS + WORDS


def test_places_of_other_axes(tmp_path: Path) -> None:
    session = seeing_session(tmp_path, placing_vision(tmp_path, axes=2))
    with pytest.raises(BundleError) as error:
        session.encode(QUESTION, PICTURES[:1])
    assert str(error.value) == (
        "offsets of 4 visual tokens have the shape [4, 2], positions of the rule 'sequential' "
        "take [4, 1]\n  hint: compile the bundle again"
    )


@pytest.mark.parametrize(("kind", "silent"), [("text", []), ("words", ["?", "<|assistant|>"])])
def test_a_vision_graph_weighs_the_question(tmp_path: Path, kind: str, silent: list[str]) -> None:
    """Its rows are multiplied by the weighted sum of the question's rows."""
    asking = OnnxGraph(tmp_path, "asking", "question")
    question = asking.input("question", "float32", (1, 20, WIDTH), "question_embeds")
    weights = asking.input("weights", "float32", (1, 20), f"question_weights:{kind}")
    asking.output(asking.node("MatMul", weights, question), "a", "float32", (1, 1, WIDTH))
    tokens = [TOKENIZER.token_to_id(token) for token in silent]
    session = seeing_session(
        tmp_path, vision_of(tmp_path), asking.finish(), text={"silent_tokens": tokens}
    )
    prompt = session.encode(QUESTION, PICTURES[:1])
    words = TOKENIZER.encode(QUESTION).ids
    if kind == "text":
        words += [TOKENIZER.token_to_id(token) for token in ("<|user|>", "<|assistant|>")]
    else:
        words = words[:-1]
    wanted = strips_of(PICTURES[0]) * TABLE[words].sum(0)
    # Rows of about 5 in float32.
    np.testing.assert_allclose(prompt.embeds[1:5], wanted, atol=2e-5, rtol=0)
