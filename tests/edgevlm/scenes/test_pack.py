"""Packing: a segment in a packed sequence is the same computation as its prompt alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AttentionInterface, LlavaForConditionalGeneration, LlavaProcessor

from edgevlm.scenes import Scene, draw_scene, make_scene
from edgevlm.scenes.attention import attend
from edgevlm.scenes.model import build_model, build_processor, use_training_attention
from edgevlm.scenes.pack import NO_LABEL, draw_segments, num_prefix, pack
from edgevlm.scenes.packed_stage import (
    PackedPictures,
    answer_tallies,
    forward_packed,
    make_batch,
    vocabulary_of,
)
from edgevlm.scenes.sample import conversation
from edgevlm.scenes.tokens import USER, build_tokenizer
from edgevlm.scenes.words import TASKS

# The description comes first, then conversations of one to three turns.
_NUM_COMPARED = 6


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    built = build_model(build_tokenizer()).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            # Wider than at the start of training, so that attention is far from uniform.
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor(build_tokenizer())


@pytest.mark.parametrize("num_pictures", [1, 2])
def test_packed_segments_equal_single_prompts(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, num_pictures: int
) -> None:
    """Float32 throughout; 1e-4 leaves room for another order of summation over 16 layers."""
    scenes = [make_scene(seed) for seed in range(70, 70 + num_pictures)]
    vocabulary = vocabulary_of(processor.tokenizer)
    batch = make_batch([scenes], vocabulary, random.Random(1))
    stock = _stock_logits(model, processor, scenes)
    use_training_attention(model)
    with torch.no_grad():
        hidden, _, _ = forward_packed(
            model, batch, user=processor.tokenizer.convert_tokens_to_ids(USER)
        )
        packed = model.lm_head(hidden)[0]
    segments = batch["segments"][0]
    segment_lengths = []
    for number, logits in enumerate(stock):
        found = packed[segments == number]
        segment_lengths.append(len(found))
        torch.testing.assert_close(found, logits[num_prefix(num_pictures) : -1], atol=1e-4, rtol=0)
    assert min(segment_lengths) > 4


def _stock_logits(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, scenes: list[Scene]
) -> list[torch.Tensor]:
    """Logits of every segment as a prompt of its own, through transformers' own forward."""
    model.model.vision_tower.config._attn_implementation = "sdpa"
    model.model.language_model.config._attn_implementation = "sdpa"
    images = [draw_scene(scene) for scene in scenes]
    results = []
    for questions in draw_segments(scenes, random.Random(1))[:_NUM_COMPARED]:
        turns = [(question.text, question.answer) for question in questions[:-1]]
        messages = conversation(len(scenes), turns, questions[-1].text)
        answer = {"type": "text", "text": questions[-1].answer}
        messages.append({"role": "assistant", "content": [answer]})  # type: ignore[list-item]
        text = processor.apply_chat_template(messages, tokenize=False)
        inputs = processor(images=images, text=text, return_tensors="pt")
        with torch.no_grad():
            results.append(model(**inputs).logits[0])
    return results


def test_labels_are_the_answers(processor: LlavaProcessor) -> None:
    """Labelled tokens of each answer decode to the answer and its end."""
    tokenizer = processor.tokenizer
    scenes = [make_scene(seed) for seed in (5, 6)]
    segments = draw_segments(scenes, random.Random(2))
    packed = pack(segments, vocabulary_of(tokenizer), first_position=289, rows=6, width=79)
    asked = {
        (number, TASKS.index(question.task), question.answer + "<|end|>")
        for number, questions in enumerate(segments)
        for question in questions
    }
    assert packed.answers.max() > 20
    for answer in range(packed.answers.max() + 1):
        at = packed.answers == answer
        (number,), (task,) = set(packed.segments[at]), set(packed.tasks[at])
        assert (number, task, tokenizer.decode(packed.labels[at])) in asked
    assert ((packed.labels == NO_LABEL) == (packed.weights == 0)).all()
    assert (packed.positions[packed.segments >= 0].min()) == 289
    for number in range(packed.segments.max() + 1):
        positions = packed.positions[packed.segments == number]
        assert (np.diff(positions) == 1).all()


def test_batches_depend_on_the_step_alone(processor: LlavaProcessor) -> None:
    pictures = PackedPictures(3, processor.tokenizer)
    first, again, other = pictures[9], pictures[9], pictures[10]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixels"], other["pixels"])
    assert first["ids"].shape[0] * 2 == first["pixels"].shape[0]
    assert other["ids"].shape[0] == other["pixels"].shape[0]


def test_tallies(processor: LlavaProcessor) -> None:
    """All right scores full; one wrong token costs its whole answer."""
    batch = PackedPictures(3, processor.tokenizer)[0]
    labelled = batch["labels"] != NO_LABEL
    right = torch.ones(int(labelled.sum()), dtype=torch.bool)
    tallies = answer_tallies(right, batch, labelled)
    assert all(total == count for total, count in tallies.values())
    where = batch["tasks"][labelled] == TASKS.index("where")
    right[where.nonzero()[0]] = False
    total, count = answer_tallies(right, batch, labelled)["where"]
    assert total == count - 1


def test_attention_and_its_gradients_against_autograd() -> None:
    """Float64; 1e-12 is the round-off of sums over 7 keys."""
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(7, 7, dtype=torch.float64).masked_fill(
        torch.ones(7, 7).triu(1).bool(), float("-inf")
    )
    pull = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    query, key, value = given
    plain = (query @ key.transpose(-1, -2) + mask).softmax(-1) @ value
    expected = torch.autograd.grad(plain, given, pull)
    ours = attend(query, key, value, mask)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    for grad, wanted in zip(torch.autograd.grad(ours, given, pull), expected, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=0)


def test_processor_leaves_a_scene_as_it_is(processor: LlavaProcessor) -> None:
    image = draw_scene(make_scene(1))
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    expected = (np.asarray(image).astype(np.float32) / 255 - 0.35) / 0.25
    # Float32 arithmetic in another order.
    np.testing.assert_allclose(pixels.numpy().transpose(1, 2, 0), expected, atol=1e-6)
    wide = Image.new("RGB", (300, 50), (10, 20, 30))
    assert processor.image_processor(wide, return_tensors="pt")["pixel_values"].shape[-2:] == (
        96,
        96,
    )


def test_model_is_small_and_tied(model: LlavaForConditionalGeneration) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters * 2 <= 16_000_000
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert "edgevlm_scenes_packed" in AttentionInterface().valid_keys()


def test_practice_asks_mostly_what_is_practised() -> None:
    rng = random.Random(0)
    asked: list[str] = []
    described = 0
    for seed in range(300):
        segments = draw_segments([make_scene(seed)], rng, ("relation",))
        tasks = [question.task for segment in segments for question in segment]
        described += tasks.count("describe")
        asked += [task for task in tasks if task != "describe"]
    # 12 of 23 parts, less the scenes with no two objects to relate.
    assert 0.40 < asked.count("relation") / len(asked) < 0.53
    # Every other task is still asked, and one picture in three described.
    assert set(asked) == set(TASKS) - {"describe"}
    assert 75 < described < 125
